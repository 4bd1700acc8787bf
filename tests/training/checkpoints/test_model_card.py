"""What a checkpoint has beside its weights: the tokenizer, and a card whose program runs."""

import json
import re
import shutil
from importlib.util import find_spec

import huggingface_hub
import pytest
import yaml
from labelled_sets import WORDS
from safetensors.torch import load_file
from transformers import AutoTokenizer

from adafrugal.data import corpus
from adafrugal.data.text import sources
from adafrugal.data.text.documents import select
from adafrugal.settings.compose import recorded
from adafrugal.system.signals import Stop
from adafrugal.tracking.record import Record
from adafrugal.training.checkpoints import checkpoint, model_card
from adafrugal.training.checkpoints.model_card import ModelCard
from adafrugal.training.session import run

pytestmark = pytest.mark.usefixtures("no_estimate")
DECODER = ["model=decoder", "model.name=a/b", "data.tokenizer.kind=pretrained", "data.tokenizer.name=a/b"]
LORA = pytest.param("lora", marks=pytest.mark.skipif(not find_spec("peft"), reason="peft is an extra"))


def newest(record):
    return sorted(record.directory.glob("checkpoints/step-*"))[-1]


def runs(text, place, monkeypatch, capsys):
    """What the program of a card prints, beside its checkpoint."""
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(place.parent)
    capsys.readouterr()
    exec(code, {})
    return capsys.readouterr().out


def test_the_tokens_that_the_run_read_are_those_of_its_checkpoint(smoke, cache_root):
    """All of the held-out text, as the store has it."""
    settings = recorded(smoke.config() | {"cache_root": str(cache_root)})
    plan = corpus.locate(settings, str)
    _, stored = plan.splits()
    (shard,) = stored.shards()
    split = plan.source.validation
    documents = [
        t for pieces, _ in sources.read(plan.source, split, sources.Position()) for t in select(pieces, split.rules)[0]
    ]
    found = AutoTokenizer.from_pretrained(newest(smoke))
    ids = [i for tokens in found(documents)["input_ids"] for i in (*tokens, found.eos_token_id)]
    assert len(documents) > 300 and ids == shard.tokens.tolist()


def test_the_card_says_what_the_run_was_and_its_program_generates_text(smoke, monkeypatch, capsys):
    place = newest(smoke)
    text, line = (place / "README.md").read_text(), smoke.metrics()[-1]
    _, header, body = text.split("---\n", 2)
    assert yaml.safe_load(header) == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["adafrugal"],
    }  # fmt: skip
    rows = dict(re.findall(r"^\| (.+) \| (.+) \|$", body, re.MULTILINE))
    assert rows["steps"] == "20 of 20" and rows["tokens"] == f"{line['tokens']:,}"
    assert rows["validation loss"] == f"{line['validation_loss']:.4f}"
    assert rows["optimizer's state"] == f"{line['state_bytes'] / 2**20:.2f} MiB"
    about = smoke.environment()
    assert rows["data's fingerprint"] == about["data"]["fingerprint"]
    assert about["data"]["tokenizer"]["fingerprint"] in rows["tokenizer"]
    assert rows["code"].partition(",")[0] == about["code"]["commit"]
    (settings,) = re.findall(r"```yaml\n(.*?)```", body, re.DOTALL)
    assert yaml.safe_load(settings) == about["identity"]["differs"]
    assert "closed each document with the id 1 (`</s>`)" in body and "names no license" in body
    assert len(runs(body, place, monkeypatch, capsys)) > 20
    assert set(json.loads((place / "checksums.json").read_text())) == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "state.pt", "tokenizer.json",
        "tokenizer.model", "tokenizer_config.json",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "about", "base"),
    [
        ([], "A LLaMA decoder, trained from random weights", None),
        (["model.weights=a/b"], "A LLaMA decoder, trained from the weights of a/b", "a/b"),
        (["model.weights=/home/me/b"], "A LLaMA decoder, trained from the weights of b", None),
        (["model.weights=runs/k/checkpoints/step-00000004"],
         "A LLaMA decoder, trained from the weights of k/step-4", None),
        (DECODER, "The decoder a/b, trained from its weights", "a/b"),
        ([*DECODER, "model.pretrained=false"], "The decoder a/b, trained from random weights", None),
        (["experiments=glue/rte"], "The encoder FacebookAI/roberta-base, fine-tuned", "FacebookAI/roberta-base"),
    ],
)  # fmt: skip
def test_a_card_says_with_which_weights_the_run_began(words, about, base, settings_of):
    card = ModelCard(settings_of(*words), {}, None)
    assert card._about().startswith(f"{about} with the optimizer")
    assert yaml.safe_load(card._header()).get("base_model") == base


def test_a_name_too_long_for_a_path_is_none(settings_of):
    assert model_card._public("a" * 300) == "a" * 300
    card = ModelCard(settings_of(*DECODER[:1], f"model.name={'a' * 300}/b", *DECODER[2:]), {}, None)
    assert f"base_model: {'a' * 300}/b" in card._header()


def test_a_header_names_what_is_at_the_hub(settings_of):
    """As the hub's own client reads it."""
    glue = {"datasets": ["nyu-mll/glue"], "base_model": "FacebookAI/roberta-base"}
    for words, kind, more in (
        (("data=c4",), "text-generation", {"datasets": ["allenai/c4"]}),
        (("experiments=glue/rte",), "text-classification", glue),
        (("data=text", "data.source=corpus/*.txt"), "text-generation", {}),
    ):
        card = ModelCard(settings_of(*words), {}, None)
        found = huggingface_hub.ModelCard(f"---\n{card._header()}\n---\n").data.to_dict()
        assert {name: found.get(name) for name in ("datasets", "base_model") if found.get(name)} == more
        assert (found["pipeline_tag"], found["library_name"]) == (kind, "transformers") and "license" not in found


def test_a_card_names_no_path_of_this_machine_and_its_table_holds_any_name(finetune_settings, tmp_path):
    chosen, choices = finetune_settings("rte", "optimizer=adamw", "trainer.epochs=1")
    (odd := tmp_path / "a|b<img src=x>\nzz").symlink_to(chosen.data.source)
    chosen.data.source = str(odd)
    record, _ = run(chosen, choices)
    text = (newest(record) / "README.md").read_text()
    assert "/tmp" not in text and str(tmp_path.parent) not in text and "datasets:" not in text
    assert "| data | a&#124;b&lt;img src=x> zz rte |" in text and 'model.name: "bert"' in text


@pytest.mark.parametrize("arm", ["adafrugal", LORA])
def test_the_program_of_a_fine_tuned_encoder_runs(arm, finetune_settings, monkeypatch, capsys, tiny_encoder):
    record, _ = run(*finetune_settings("rte", f"optimizer={arm}", "trainer.epochs=1"))
    place = newest(record)
    assert "grad_fn" in runs((place / "README.md").read_text(), place, monkeypatch, capsys)
    ours, theirs = (AutoTokenizer.from_pretrained(directory) for directory in (place, tiny_encoder))
    for text in (" ".join(WORDS), "unseen", "", " the  matrix "):
        assert ours(text, text)["input_ids"] == theirs(text, text)["input_ids"]
    assert json.loads((place / "tokenizer.json").read_text())["truncation"] is None


def test_a_run_continues_from_a_checkpoint_of_an_older_version(settings, monkeypatch):
    """Without a tokenizer and a card; the next checkpoint has them."""
    chosen, choices = settings("optimizer=adamw", "checkpoint.every=100", "eval.every=100")
    asked = iter(step == 4 for step in range(1, 200))
    monkeypatch.setattr(Stop, "requested", property(lambda stop: next(asked), lambda stop, value: None), raising=False)
    record, outcome = run(chosen, choices)
    place = newest(record)
    assert outcome == "interrupted"
    rows = (place / "README.md").read_text()
    assert "| evaluation | none at this step |" in rows
    names = {"README.md", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"}
    sums = json.loads((place / "checksums.json").read_text())
    for name in names:
        (place / name).unlink()
    (place / "checksums.json").write_text(json.dumps({name: sums[name] for name in sums.keys() - names}))
    assert checkpoint.damage(place) is None
    record, outcome = run(chosen, choices)
    assert (
        outcome == "finished"
        and [e["step"] for e in Record(record.directory).events() if e["event"] == "start"][-1] > 0
    )
    assert all((newest(record) / name).exists() for name in names)


def test_the_files_are_as_whole_as_the_weights(smoke, tmp_path):
    """One that is damaged makes the checkpoint damaged."""
    place = shutil.copytree(newest(smoke), tmp_path / "step-00000020")
    (place / "tokenizer.json").write_text("{}")
    assert checkpoint.damage(place) == "tokenizer.json is not as it was written"
    assert load_file(place / "model.safetensors")
