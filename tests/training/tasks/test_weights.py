"""Pre-training that begins with weights: of a run, of a directory, of any decoder."""

import json
import re
import shutil

import pytest
import tokenizers
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from adafrugal.models import decoder
from adafrugal.settings.identity import differing, identify
from adafrugal.settings.schema import DecoderSettings
from adafrugal.system.errors import SettingError
from adafrugal.training import evaluate
from adafrugal.training.distributed.ranks import Ranks
from adafrugal.training.loop import Loop
from adafrugal.training.session import run
from adafrugal.training.tasks.pretrain import Pretrain

pytestmark = pytest.mark.usefixtures("no_estimate")

SHORT = ["trainer.steps=4", "eval.every=4", "eval.tokens=256", "trainer.sequence_length=32", "checkpoint.every=2"]
STILL = ["optimizer.lr=0"]  # so that a run ends with the weights with which it began


def newest(record):
    return max((record.directory / "checkpoints").glob("step-*"))


def weights(directory):
    return load_file(directory / "model.safetensors")


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.fixture
def source(finished):
    """A run whose weights others take."""
    return finished(*SHORT, "seed=3")


@pytest.fixture
def gpt2(source, tmp_path):
    """A tiny GPT-2 as `save_pretrained` writes it, with the tokenizer of a run's checkpoint."""
    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=512, n_positions=64, n_embd=32, n_layer=2, n_head=2))
    model.save_pretrained(tmp_path / "gpt2")
    for file in newest(source).glob("tokenizer*"):
        shutil.copy(file, tmp_path / "gpt2")
    return tmp_path / "gpt2"


def of(place):
    return ["model=decoder", f"model.name={place}", "data.tokenizer.kind=pretrained", f"data.tokenizer.name={place}"]


def test_a_llama_begins_with_the_weights_of_a_run_at_step_0(settings, finished, source):
    key = source.directory.name
    words = [*SHORT, *STILL, f"model.weights={source.directory}"]
    record = finished(*words)
    assert_same(weights(newest(record)), weights(newest(source)))
    assert record.metrics()[-1]["step"] == 4
    found, choices = settings(*words)
    assert differing(found)["model.weights"] == f"{key}/step-4"
    named = settings(*SHORT, *STILL, f"model.weights={newest(source)}")
    assert identify(*named).key == identify(found, choices).key != identify(*settings(*SHORT, *STILL)).key
    shutil.rmtree(source.directory)
    assert run(*named)[1] == "finished before"


def test_a_run_with_other_ids_than_its_weights_know_says_so(finished, source, tmp_path, capsys):
    shutil.copytree(newest(source), tmp_path / "weights")
    file = tmp_path / "weights" / "tokenizer.json"
    said = f"data.tokenizer.kind=pretrained data.tokenizer.name={file.parent}"
    finished(*SHORT, f"model.weights={file.parent}")
    assert said not in capsys.readouterr().out
    found = json.loads(file.read_text())
    vocabulary = found["model"]["vocab"]
    one, other = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    file.write_text(json.dumps(found))
    finished(*SHORT, f"model.weights={file.parent}", "seed=1")
    assert said in capsys.readouterr().out


def test_a_run_stays_itself_while_the_runs_that_it_began_with_go_and_grow(settings, source, tmp_path, monkeypatch):
    words = [*SHORT, "optimizer=adamw", "schedule=constant", "schedule.warmup=1", f"model.weights={source.directory}"]
    comes = Loop._next_batch
    with monkeypatch.context() as patched:
        patched.setattr(Loop, "_next_batch", lambda loop, stop: comes(loop, stop) if loop.progress.step < 2 else None)
        assert run(*settings(*words))[1] == "interrupted"
    source.directory.rename(tmp_path / "aside")
    first, outcome = run(*settings(*words))
    assert outcome == "finished"
    assert [event["step"] for event in first.events() if event["event"] == "start"] == [0, 2]
    (tmp_path / "aside").rename(source.directory)

    further = [*words, "trainer.steps=6", f"trainer.continue_from={first.directory}"]
    second, outcome = run(*settings(*further))
    assert outcome == "finished"
    for directory in (source.directory, first.directory):
        shutil.copytree(directory / "checkpoints" / "step-00000004", directory / "checkpoints" / "step-00000006")
    assert run(*settings(*further))[1] == run(*settings(*words))[1] == "finished before"

    config = second.config()
    assert config["model"]["weights"] == f"{source.directory.name}/step-4"
    assert config["trainer"]["continue_from"] == f"{first.directory.name}/step-4"
    numbers = evaluate.evaluate(second.directory, [f"cache_root={settings()[0].cache_root}"])
    assert numbers["validation_loss"] == second.summary()["validation_loss"]


def test_one_of_several_processes_reads_the_weights_for_their_hash(gpt2, settings, monkeypatch):
    made, store = [], torch.distributed.HashStore()
    fingerprint = decoder.fingerprint
    monkeypatch.setattr(decoder, "fingerprint", lambda place: made.append(fingerprint(place)) or made[-1])
    found = []
    for rank in range(2):
        task = Pretrain.__new__(Pretrain)
        task.ranks = Ranks(rank, 2)
        task.ranks._store = store
        found.append(task._fingerprint_of_weights(settings(*of(gpt2))[0].model, None))
    assert found == made * 2


def test_another_shape_is_refused_with_the_setting_to_change(settings, source):
    found = settings(*SHORT, f"model.weights={source.directory}", "model.hidden_size=64")
    with pytest.raises(SettingError, match=r"hidden_size is 32, and the model has 64; allowed: model.hidden_size=32"):
        run(*found)
    with pytest.raises(SettingError, match=r"model.weights is /nowhere, and there is no such directory"):
        run(*settings(*SHORT, "model.weights=/nowhere"))


def test_gpt2_is_trained_from_its_weights_and_its_linear_maps_are_split(finished, gpt2, settings, capsys):
    record = finished(*SHORT, *STILL, *of(gpt2))
    assert re.search(r"Linear in blocks +split +8 ", capsys.readouterr().out), "Conv1D's matrices"
    ours, theirs = (AutoModelForCausalLM.from_pretrained(place).state_dict() for place in (newest(record), gpt2))
    assert_same(ours, theirs)
    summary = record.summary()
    trained = finished(*SHORT, *of(gpt2), "optimizer.lr=1e-2", "model.loss_chunk_rows=10")
    assert trained.summary()["validation_loss"] < summary["validation_loss"]
    numbers = evaluate.evaluate(trained.directory, [f"cache_root={settings()[0].cache_root}"])
    assert numbers["validation_loss"] == trained.summary()["validation_loss"]
    random = finished(*SHORT, *STILL, *of(gpt2), "model.pretrained=false")
    assert not torch.equal(weights(newest(random))["transformer.wpe.weight"], theirs["transformer.wpe.weight"])


def test_other_weights_in_the_directory_are_refused_at_a_resume(settings, gpt2, monkeypatch):
    comes = Loop._next_batch
    with monkeypatch.context() as patched:
        patched.setattr(Loop, "_next_batch", lambda loop, stop: comes(loop, stop) if loop.progress.step < 2 else None)
        assert run(*settings(*SHORT, *of(gpt2)))[1] == "interrupted"
    kept = (gpt2 / "model.safetensors").read_bytes()
    torch.manual_seed(2)
    GPT2LMHeadModel(GPT2Config(vocab_size=512, n_positions=64, n_embd=32, n_layer=2, n_head=2)).save_pretrained(gpt2)
    with pytest.raises(SettingError, match="are not those with which the run began"):
        run(*settings(*SHORT, *of(gpt2)))
    (gpt2 / "model.safetensors").write_bytes(kept)
    assert run(*settings(*SHORT, *of(gpt2)))[1] == "finished"


def test_a_decoder_that_cannot_be_trained_here_is_refused_in_a_line(settings, gpt2, tmp_path, source):
    with pytest.raises(SettingError, match=r"data.tokenizer.kind is 'train'; allowed: pretrained with model=decoder"):
        settings("model=decoder", f"model.name={gpt2}")
    with pytest.raises(SettingError, match=r"sequence_length is 65; allowed: up to the decoder's positions \(64\)"):
        run(*settings(*SHORT, *of(gpt2), "trainer.sequence_length=65"))
    small = GPT2Config(vocab_size=100, n_positions=64, n_embd=32, n_layer=1, n_head=2)
    GPT2LMHeadModel(small).save_pretrained(tmp_path / "small")
    with pytest.raises(SettingError, match=r"model.vocabulary_size is 100, .*data.tokenizer.name=…"):
        run(*settings(*SHORT, *of(gpt2), f"model.name={tmp_path / 'small'}"))
    capped = Gemma2Config(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.01,
    )  # fmt: skip
    Gemma2ForCausalLM(capped).save_pretrained(tmp_path / "capped")
    with pytest.raises(SettingError, match="whose logits are not its head's of the hidden states"):
        decoder.build(DecoderSettings(name=str(tmp_path / "capped")), reads=True)


def test_every_token_is_trained_whichever_id_pads(finished, tmp_path):
    """Where the end of a document pads, as with GPT-2's tokenizer, token 0 is a token like any other."""
    words = {word: number for number, word in enumerate(["the", "a", "of", "[UNK]", "<end>"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    theirs = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", eos_token="<end>")
    theirs.save_pretrained(tmp_path / "own")
    of_theirs = ["data.tokenizer.kind=pretrained", f"data.tokenizer.name={tmp_path / 'own'}"]
    for own, is_zero in (([], True), (of_theirs, False)):
        rows = weights(newest(finished(*SHORT, *own)))["model.embed_tokens.weight"]
        assert bool((rows[0] == 0).all()) == is_zero
        assert not (rows[1:5] == 0).all(1).any()
