"""Estimates of each kind of run, held against what the run's own code allocates for two steps and an evaluation."""

import pytest
from conftest import script
from labelled_sets import write_encoder, write_parquet
from transformers import GPT2Config, MistralConfig

from adafrugal.memory import __main__ as command
from adafrugal.memory.estimate import estimate

NEAR = 0.02


def assert_near(settings):
    """The larger of the stages' peaks of training, and of evaluation, beside those of a run."""
    foretold = estimate(settings).stages
    measured = script("memory_of_runs").peaks(settings)
    assert max(stage.training.total for stage in foretold) == pytest.approx(measured[0], rel=NEAR)
    assert max(stage.evaluation.total for stage in foretold) == pytest.approx(measured[1], rel=NEAR)


@pytest.mark.parametrize("words", [
    ["trainer.micro_batch_size=2", "trainer.precision=fp32"],
    ["trainer.update_in_backward=true", "trainer.activation_checkpointing=layers", "trainer.precision=bf16"],
    ["data.rows=packed", "data.mask_documents=true", "trainer.precision=fp32"],
], ids=" ".join)  # fmt: skip
def test_an_evaluation_is_the_passes_without_gradients(words, settings):
    assert_near(settings("optimizer=adafrugal", "model.hidden_size=96", *words)[0])


def test_the_peak_is_that_of_the_larger_phase(settings):
    """Whose logits take more than a step of one row that keeps one gradient."""
    words = "trainer.update_in_backward=true", "model.loss_chunk_rows=null", "trainer.precision=bf16"
    (stage,) = estimate(settings("optimizer=signsgd", "model.vocabulary_size=20000", *words)[0]).stages
    assert stage.peak.total == max(stage.training.total, stage.evaluation.total)
    assert (stage.evaluation.phase, stage.evaluation.gradients) == ("evaluation", 0)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Directories of a RoBERTa and a BERT that are wide enough for activations to count."""
    root = tmp_path_factory.mktemp("wide")
    shape = {"hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 4}
    return {kind: write_encoder(root / kind, kind, **shape) for kind in ("bert", "roberta")}


@pytest.fixture(scope="module")
def long_texts(tmp_path_factory):
    """A labelled set whose texts fill trainer.sequence_length, but for two of a batch."""
    root = tmp_path_factory.mktemp("labelled") / "long"
    texts = ["never the matrix " * (2 if number % 4 == 3 else 40) for number in range(8)]
    for split in ("train", "validation"):
        found = [{"text": text, "label": number % 2} for number, text in enumerate(texts)]
        write_parquet(root / f"{split}.parquet", found)
    return root


@pytest.mark.parametrize(("kind", "words"), [
    ("roberta", ["optimizer=adamw", "trainer.precision=fp32"]),
    ("bert", ["optimizer=adafrugal", "trainer.precision=bf16", "trainer.micro_batch_size=4"]),
    ("bert", ["optimizer=frugal", "trainer.precision=fp32", "trainer.activation_checkpointing=layers"]),
    ("bert", ["optimizer=lora", "trainer.precision=fp32"]),
], ids=str)  # fmt: skip
def test_fine_tuning(kind, words, encoders, long_texts, settings):
    if "optimizer=lora" in words:
        pytest.importorskip("peft", reason="peft is an extra: pip install peft")
    data = ["data=labelled", f"data.source={long_texts}", "data.fields=[text]", "data.classes=2", "eval.every=null"]
    shape = ["trainer.steps=4", "trainer.batch_size=8", "trainer.sequence_length=48"]
    assert_near(settings("task=finetune", "model=encoder", f"model.name={encoders[kind]}", *data, *shape, *words)[0])


def test_a_density_is_fitted_to_an_encoder(encoders, long_texts, capsys):
    """Whose hidden size, of which a rank is a share, is in its config.json."""
    words = ["scale=smoke", "task=finetune", "data=labelled", f"data.source={long_texts}", "data.fields=[text]",
             "data.classes=2", "model=encoder", f"model.name={encoders['bert']}"]  # fmt: skip
    frugal = ["optimizer=frugal", "optimizer.density=null", "optimizer.rank=96", "optimizer.subspace=columns"]
    assert command.main([*words, *frugal, "optimizer.fit_gib=1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("ρ begins at 0.5: 0.0")
    assert "8 × 64 tokens in a micro-batch, 8 rows in a step; precision" in out, "it has no logits of a vocabulary"


@pytest.mark.parametrize("config", [
    GPT2Config(vocab_size=512, n_positions=64, n_embd=192, n_layer=2, n_head=4),
    MistralConfig(vocab_size=512, hidden_size=192, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, max_position_embeddings=64, sliding_window=16),
], ids=["gpt2", "mistral, which has a mask"])  # fmt: skip
def test_other_decoders(config, settings, tmp_path):
    config.save_pretrained(tmp_path)
    tokens = ["data.tokenizer.kind=pretrained", "data.tokenizer.name=someone/gpt"]
    words = ["model=decoder", f"model.name={tmp_path}", "model.pretrained=false", "optimizer=adamw"]
    assert_near(settings(*tokens, *words, "trainer.precision=fp32")[0])


def test_moments_in_8_bits(settings):
    pytest.importorskip("torchao", reason="torchao is an extra: pip install torchao")
    few = ["trainer.batch_size=1", "trainer.sequence_length=8", "model.hidden_size=256", "model.intermediate_size=512"]
    assert_near(settings("optimizer=adamw_8bit", "trainer.precision=fp32", *few)[0])


PAIR = ["trainer.device=cpu", "trainer.precision=fp32", "model.hidden_size=128", "model.intermediate_size=256"]
SHARED = [
    ["trainer.parallel=ddp", "optimizer=adafrugal", "trainer.micro_batch_size=2"],
    ["trainer.parallel=fsdp", "optimizer=frugal", "trainer.batch_size=64"],
]


@pytest.fixture(scope="module")
def pairs():
    """What runs of two processes were estimated to take, and took."""
    return script("memory_of_runs").measured_together([["scale=smoke", *PAIR, *words] for words in SHARED], 2)


@pytest.mark.parametrize("place", range(len(SHARED)), ids=[" ".join(words) for words in SHARED])
def test_one_of_two_processes(place, pairs):
    """Under gloo; the copies that it frees late make the measurement of shards uneven: the least of several counts."""
    found = pairs[place]
    assert found["processes"] == 2
    for expected, allocated in zip(found["estimate"], found["allocated"], strict=True):
        assert expected == pytest.approx(allocated, rel=NEAR)


def test_shards_are_a_part_of_the_whole(capsys):
    """As many processes as are told; what they keep is divided by their number, and gloo makes no copies on a GPU."""
    words = ["scale=smoke", "optimizer=adamw", "trainer.parallel=fsdp", "trainer.precision=bf16"]
    found = {}
    for processes in (1, 2, 4):
        assert command.main([*words, "--processes", str(processes)]) == 0
        out = capsys.readouterr().out
        found[processes] = {line[:30].strip(): line.split()[-1] for line in out.splitlines() if line}
        assert (f"rows in a step, of {processes} processes; " in out) == (processes > 1)
    for kept in ("weights", "state"):
        whole, half, quarter = (float(found[n][kept]) for n in (1, 2, 4))
        assert half == pytest.approx(whole / 2, abs=0.02) and quarter == pytest.approx(whole / 4, abs=0.02)
