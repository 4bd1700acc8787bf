"""`python -m adafrugal.training.evaluate`: the numbers of a run again, numbers on other data, and what is refused."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import REPOSITORY

from adafrugal.tracking.record import Record
from adafrugal.training import evaluate
from adafrugal.training.session import run

pytestmark = pytest.mark.usefixtures("no_estimate")
SECTION = (REPOSITORY / "docs" / "runs.md").read_text().split("\n## Checkpoints\n")[1].split("\n## ")[0]
LORA = pytest.param("lora", marks=pytest.mark.skipif(not find_spec("peft"), reason="peft is an extra"))


@pytest.fixture
def numbers(cache_root, capsys):
    """A function: directory, words -> the evaluation's numbers."""

    def make(place, *words):
        capsys.readouterr()
        code = evaluate.main([str(place), *words, f"cache_root={cache_root}", "--json"])
        said = capsys.readouterr()
        assert code == 0, said.err
        return json.loads(said.out)

    return make


def contents(directory):
    return {file: file.stat().st_mtime_ns for file in directory.rglob("*")}


def ending(record):
    """The numbers of a run's last evaluation."""
    return {name: value for name, value in record.metrics()[-1].items() if name.startswith("validation_")}


def test_it_repeats_the_last_evaluation_to_the_bit_and_writes_nothing_into_the_run(finished, numbers):
    record = finished("eval.last_tokens=8000", "checkpoint.keep=3", "trainer.micro_batch_size=4")
    before = contents(record.directory)
    found = numbers(record.directory)
    assert {name: found[name] for name in ending(record)} == ending(record)
    assert (found["step"], found["data"]) == (20, "the embedded text")
    assert found["fingerprint"] == record.environment()["data"]["fingerprint"]
    words = ["trainer.batch_size=16", "trainer.micro_batch_size=8", "trainer.device=cpu", "trainer.precision=fp32"]
    assert numbers(record.directory / "checkpoints", *words)["validation_loss"] == pytest.approx(
        found["validation_loss"]
    )
    earlier = numbers(record.directory / "checkpoints" / "step-00000010", "eval.last_tokens=null")
    (at_10,) = (line for line in record.metrics() if line["step"] == 10)
    assert earlier["validation_loss"] == at_10["validation_loss"]
    assert contents(record.directory) == before


def test_so_it_does_for_a_run_that_continues_another_whose_card_says_so(finished, numbers):
    words = ["optimizer=adamw", "schedule=constant", "schedule.warmup=2"]
    source = finished(*words, "trainer.steps=4")
    record = finished(*words, "trainer.steps=6", f"trainer.continue_from={source.directory}")
    found = numbers(record.directory)
    assert {name: found[name] for name in ending(record)} == ending(record)
    (place,) = record.directory.glob("checkpoints/step-*")
    assert f"| continued from | {source.directory.name}, step 4 |" in (place / "README.md").read_text()


@pytest.mark.parametrize("arm", ["adafrugal", LORA])
def test_an_encoder_is_scored_by_its_task(arm, finetune_settings, numbers, glue):
    record, _ = run(*finetune_settings("mrpc", f"optimizer={arm}", "task.lr=1e-2", "trainer.epochs=1"))
    found = numbers(record.directory)
    assert {name: found[name] for name in ending(record)} == ending(record)
    other = numbers(record.directory, "data=wnli", f"data.source={glue}")
    assert (other["data"], list(other)[4:]) == (f"{glue} wnli", ["validation_loss", "validation_accuracy"])
    with pytest.raises(Exception, match=r"data.classes is 3; allowed: 2, as the checkpoint's head has"):
        evaluate.evaluate(record.directory, ["data=mnli", f"data.source={glue}"])


def test_other_data_are_read_with_the_checkpoints_own_tokenizer(smoke, numbers, c4_layout):
    words = ["data=c4", f"data.source={c4_layout}"]
    found = numbers(smoke.directory, *words)  # of T5's, which conf/data/c4.yaml names, ids exceed this vocabulary
    assert found["data"] == str(c4_layout) and 3 < found["validation_loss"] < 8


def test_a_checkpoint_without_a_tokenizer_needs_its_name(smoke, numbers, c4_layout, tmp_path):
    old = shutil.copytree(smoke.directory, tmp_path / "old")
    (place,) = old.glob("checkpoints/step-*")
    names = ("README.md", "tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    model = shutil.copy(place / "tokenizer.model", tmp_path / "own.model")
    sums = json.loads((place / "checksums.json").read_text())
    (place / "checksums.json").write_text(json.dumps({name: sums[name] for name in sums.keys() - {*names}}))
    for name in names:
        (place / name).unlink()
    assert numbers(old)["validation_loss"] == ending(smoke)["validation_loss"]
    words = ["data=c4", f"data.source={c4_layout}"]
    with pytest.raises(Exception, match=r"has no tokenizer, since an older version wrote it; add data.tokenizer.kind"):
        evaluate.evaluate(old, words)
    named = ["data.tokenizer.kind=sentencepiece", f"data.tokenizer.name={model}"]
    assert numbers(old, *words, *named)["validation_loss"] == numbers(smoke.directory, *words)["validation_loss"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["optimizer=adamw"], "optimizer=adamw changes no evaluation; allowed: data, cache_root, trainer.device"),
        (["trainer.steps=7"], "trainer.steps=7 changes no evaluation"),
        (["trainer.precision=fp32", "trainer.compile=true"], "trainer.compile=true changes no evaluation"),
        (["trainer.continue_from=/nonexistent"], "trainer.continue_from=/nonexistent changes no evaluation"),
        (["eval.every=5"], "eval.every=5 changes no evaluation"),
        (["data.seed=5"], "data.seed=5 changes no evaluation"),
        (["eval.last_tokens=256", "eval.tokens=512"], "eval.tokens=512 changes no evaluation"),
        (["model.hidden_size=8"], "model.hidden_size=8 changes no evaluation"),
        (["anything"], "anything changes no evaluation"),
        (["data=txt"], "data: there is no 'txt'; did you mean text?"),
        (["eval.token=5"], "eval.token: eval has no 'token'"),
        (["eval.tokens=3"], "eval.tokens is 3; allowed: one sequence (64) or more"),
        (["data=text", "data.source=./nowhere.txt"], "data.source is ./nowhere.txt, and there is no such file"),
        (["data.tokenizer.kind=train"], "data.tokenizer.kind is given, but a checkpoint is evaluated with its own"),
        (["data=rte"], "data is of kind labelled and task is pretrain"),
    ],
)
def test_a_wrong_word_is_one_line(words, says, smoke, cache_root, capsys):
    assert evaluate.main([str(smoke.directory), *words, f"cache_root={cache_root}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {says}") and said.count("\n") == 1, said


def test_what_is_no_checkpoint_is_one_line(smoke, tmp_path, capsys):
    lonely = shutil.copytree(next(smoke.directory.glob("checkpoints/step-*")), tmp_path / "a" / "b" / "step-00000020")
    failed, empty = tmp_path / "failed", tmp_path / "empty"
    Record(failed).begin({})
    Record(failed).set_status("failed", reason="the loss is nan at step 7")
    (empty / "checkpoints").mkdir(parents=True)
    first, step = empty / "checkpoints" / "step-1", smoke.directory / "checkpoints" / "step-00000007"
    allowed = "allowed: a run's directory, or a step-… of its checkpoints"
    damaged = shutil.copytree(smoke.directory, tmp_path / "damaged")
    next(damaged.glob("checkpoints/*/config.json")).write_text("{}")
    for place, says in (
        (tmp_path, f"{tmp_path} is no checkpoint; {allowed}"),
        (empty, f"{empty} is no checkpoint; {allowed}"),
        (tmp_path / "none", f"{tmp_path / 'none'} does not exist; {allowed}"),
        (step, f"{step} does not exist; allowed: step-00000020\n"),
        (first, f"{first} does not exist; allowed: a checkpoint of another run, since there are none"),
        (failed, f"{failed} is of a run without a checkpoint, whose status is failed (the loss is nan at step 7)"),
        ("--jsn", "there is no option --jsn; did you mean --json? allowed: --json, --help"),
        ("--steps=3", "there is no option --steps; did you mean trainer.steps=3? Settings are written without dashes"),
        (None, f"no checkpoint is given; {allowed}"),
        (lonely, f"{lonely} is not in a run's directory with config.yaml and environment.json"),
        (damaged, f"the checkpoint {damaged / 'checkpoints' / 'step-00000020'} is damaged (config.json is not as it"),
    ):
        assert evaluate.main(["--json", *([] if place is None else [str(place)])]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: {says}") and said.count("\n") == 1, said
    assert evaluate.main(["--help"]) == 0
    assert capsys.readouterr().out == evaluate.__doc__


def test_the_section_of_the_docs_runs(smoke, cache_root, tmp_path, monkeypatch, capsys):
    """Its program, its commands, and the hub's own command by its help."""
    monkeypatch.chdir(smoke.directory.parents[2])
    Path("corpus").mkdir()
    Path("corpus/a.txt").write_text("\n\n".join(f"Paragraph {i} returns {i * i} gradients." for i in range(2000)))
    (program,) = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
    exec(program, {})
    assert len(capsys.readouterr().out) > 20
    lines = re.findall(r"^((?:python|hf) .*?)(?: +# .*)?$", SECTION, re.MULTILINE)
    assert len(lines) == 5
    for words in map(shlex.split, lines):
        if words[0] == "hf":
            command = [sys.executable, "-m", "huggingface_hub.cli.hf", "upload", "--help"]
            helped = subprocess.run(command, capture_output=True, text=True).stdout
            assert re.search(r"REPO_ID \[LOCAL_PATH\]", helped) and all(
                w in helped for w in words if w.startswith("--")
            )
            assert Path(words[3]).is_dir()
        else:
            assert words[:3] == ["python", "-m", "adafrugal.training.evaluate"]
            assert evaluate.main([*words[3:], f"cache_root={cache_root}"]) == 0, words
            assert "bits" in capsys.readouterr().out
