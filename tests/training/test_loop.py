"""The loop against a few lines written by hand: same losses, same gradients, same evaluation."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from adafrugal.models import llama, optimizers
from adafrugal.settings.identity import identify
from adafrugal.system.errors import SettingError, TrainingError
from adafrugal.tracking.record import Record
from adafrugal.training.devices import open_device
from adafrugal.training.display import Display
from adafrugal.training.loop import Loop
from adafrugal.training.session import run
from adafrugal.training.tasks.pretrain import Pretrain

pytestmark = pytest.mark.usefixtures("no_estimate")


@pytest.fixture
def pretrain(settings):
    """A function that builds the task of a tiny run: overrides -> (task, settings)."""
    tasks = []

    def make(*overrides):
        chosen, _ = settings(*overrides)
        tasks.append(Pretrain(chosen, open_device(chosen.trainer), str))
        return tasks[-1], chosen

    yield make
    for task in tasks:
        task.close()


@pytest.fixture
def loop(pretrain, tmp_path):
    """A function that builds the loop of a tiny run: overrides -> the loop."""

    def make(*overrides):
        task, chosen = pretrain(*overrides)
        optimizer, record = optimizers.build(chosen, optimizers.groups(chosen, task.model)), Record(tmp_path / "record")
        record.begin({})
        return Loop(chosen, task, optimizer, record, Display(), {})

    return make


def advance(loop, steps=1):
    for _ in range(steps):
        loop.advance(loop.task.work(loop.progress.step + 1))


def steps_of(record, kind):
    return [event["step"] for event in record.events() if event["event"] == kind]


def test_losses_are_those_of_a_loop_written_by_hand(finished, pretrain):
    words = ["optimizer=adamw", "trainer.log_every=1", "optimizer.weight_decay=0.1"]
    record, (found, chosen) = finished(*words), pretrain(*words)
    torch.manual_seed(chosen.seed)
    model = llama.build(chosen.model)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1)
    for line in record.metrics():
        step = line["step"]
        lr = 1e-3 * ((step - 1) / 2 if step <= 2 else 0.1 + 0.45 * (1 + math.cos(math.pi * (step - 3) / 18)))
        assert line["lr"] == pytest.approx(lr, rel=1e-9)
        for group in optimizer.param_groups:
            group["lr"] = lr
        (batch,) = found.work(step).batches
        loss = cross_entropy(model(input_ids=batch.tokens).logits.flatten(0, 1), batch.targets.flatten())
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("clip", ["null", "0.1"])
def test_gradients_do_not_depend_on_how_the_batch_is_divided(loop, clip):
    seen = []
    for rows in (8, 4, 1):
        built = loop(f"trainer.micro_batch_size={rows}", f"trainer.clip_norm={clip}")
        named, grads = list(built.task.model.named_parameters()), {}
        built.optimizer.register_step_pre_hook(
            lambda *_, grads=grads, named=named: grads.update({name: p.grad.clone() for name, p in named})
        )
        advance(built)
        assert all(p.grad is None for p in built.task.model.parameters())
        seen.append(grads)
    norm = torch.sqrt(sum(g.square().sum() for g in seen[0].values()))
    assert (norm.item() == pytest.approx(0.1, rel=1e-4)) is (clip == "0.1")
    for other in seen[1:]:
        for name, grad in seen[0].items():
            torch.testing.assert_close(other[name], grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("words", [["trainer.clip_norm=0.1"], ["trainer.micro_batch_size=4"]], ids=str)
def test_the_norm_of_the_gradients_is_that_of_the_step_whose_line_it_stands_in_before_clipping(loop, words):
    built, seen = loop("optimizer=adamw", "trainer.log_every=2", *words), []
    measure, params = built._gradient_norm.measure, [*built.task.model.parameters()]

    def watched(scale):
        seen.append(math.sqrt(sum(p.grad.double().square().sum().item() for p in params)))
        measure(scale)

    built._gradient_norm.measure = watched
    advance(built, steps=4)
    assert [line["gradient_norm"] for line in built.record.metrics()] == pytest.approx(seen, rel=1e-5)
    assert len(seen) == 2, "only where a line is written"


def test_gradients_that_are_freed_in_the_backward_pass_have_no_norm(loop):
    built = loop("optimizer=adamw", "trainer.update_in_backward=true", "trainer.log_every=1")
    advance(built)
    assert "gradient_norm" not in built.record.metrics()[0]


def test_seconds_since_the_start_go_on_where_a_run_is_resumed(loop):
    built = loop("optimizer=adamw", "trainer.log_every=1")
    advance(built, steps=2)
    built._save()
    built.close()
    resumed = type(built.progress).from_state(built.progress.state_dict())
    first, second = (line["elapsed"] for line in built.record.metrics())
    assert 0 < first < second <= resumed.wall


def test_evaluation_is_the_token_weighted_loss_and_bits_of_the_decoded_bytes(pretrain):
    task, _ = pretrain("trainer.micro_batch_size=1", "eval.tokens=700")
    found = task.evaluate(last=False)
    plan = task._corpus.plan
    validation = np.load(plan.directory / "validation" / "00000.tokens.npy")
    rows = [i * ((len(validation) - 1) // 64) // 10 for i in range(10)]
    model, tokenizer = task.model.eval(), plan.tokenizer
    nats, count, length = 0.0, 0, 0
    for row in rows:
        span = torch.from_numpy(validation[row * 64 : row * 64 + 65].astype(np.int64))
        with torch.no_grad():
            logits = model(input_ids=span[None, :-1]).logits[0].double()
        nats += cross_entropy(logits, span[1:], reduction="sum").item()
        count += 64
        pieces = [int(i) for i in span[1:] if i != tokenizer.end]
        length += sum(len(tokenizer._model.id_to_piece(i).replace("▁", " ").encode()) for i in pieces)
        length -= sum(5 for i in pieces if tokenizer._model.is_byte(i))  # "<0x41>" is six characters and one byte
        assert not any(tokenizer._model.is_byte(i) for i in pieces[:3] + pieces[-3:]), "no character is cut by a row"
    assert found["validation_loss"] == pytest.approx(nats / count, rel=1e-5)
    assert found["validation_perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-4)
    assert found["validation_bits_per_byte"] == pytest.approx(nats / math.log(2) / length, rel=1e-5)
    assert task.evaluate(last=False) == found
    assert task.model.training
    assert all(p.grad is None for p in task.model.parameters())


def test_seconds_of_the_summary_are_those_of_the_lines(finished):
    record = finished()
    lines, summary = record.metrics(), record.summary()
    for phase in ("data", "forward", "backward", "optimizer", "refresh", "evaluation"):
        assert summary["seconds"][phase] == pytest.approx(sum(line["seconds"].get(phase, 0) for line in lines))
    assert 0 < sum(v for k, v in summary["seconds"].items() if k != "wall") < summary["seconds"]["wall"]
    seconds = [line["seconds"] for line in lines]
    steps = [taken["wall"] - taken["evaluation"] - taken["checkpoint"] for taken in seconds]
    tokens = sum(line["tokens_per_second"] * seconds for line, seconds in zip(lines, steps, strict=True))
    assert tokens == pytest.approx(summary["tokens"])
    assert sum(taken["wall"] for taken in seconds) <= summary["seconds"]["wall"]


def test_a_loss_that_is_no_number_ends_the_run_and_is_not_saved(loop):
    built = loop("optimizer=adamw", "optimizer.lr=1e30", "schedule.warmup=0", "checkpoint.every=1")
    with pytest.raises(TrainingError, match=r"is (nan|inf) at step \d+: lower optimizer.lr \(1e\+30\) or set"):
        advance(built, steps=10)
    built.close()
    steps = [int(d.name.split("-")[1]) for d in (built.record.directory / "checkpoints").glob("step-*")]
    assert steps == [1], "the last one with a loss"


def test_a_loss_that_is_no_number_ends_the_run_also_if_a_basis_is_due_before_it_is_read(loop):
    fira = ["optimizer=fira", "optimizer.lr=1e30", "optimizer.interval=1"]
    built = loop(*fira, "schedule.warmup=0", "trainer.log_every=9")
    with pytest.raises(TrainingError, match=r"^the loss is (nan|inf) at step \d+: lower optimizer.lr"):
        advance(built, steps=10)
    built.close()


def test_a_control_can_observe_the_mean_training_loss(loop):
    observing = ["source=training", "every=3", "threshold=0.9", "start=2"]
    built = loop("trainer.log_every=2", "eval.every=100", *(f"optimizer.interval.{o}" for o in observing))
    losses, nats = [], built.task.loss

    def watched(batch):
        found = nats(batch)
        losses.append(found.item() / batch.count())
        return found

    built.task.loss = watched
    control = built.optimizer.param_groups[0]["interval"]
    advance(built, steps=7)
    assert control.last_loss == pytest.approx(sum(losses[3:6]) / 3, rel=1e-5)
    assert control.value == 3, "two observations that are near each other: round(1.5 · 2)"
    assert not any("validation_loss" in line for line in built.record.metrics()), "no evaluation for its sake"
    resumed = type(built.progress).from_state(built.progress.state_dict())
    assert resumed.unobserved == built.progress.unobserved
    assert resumed.unobserved.count == built.progress.unobserved.count > 0


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        (["checkpoint.every=10", "checkpoint.best=false"], [10, 20]),  # once, though the last is due twice
        # an evaluation for the interval's control is none of eval.every, and can not be the best
        (["checkpoint.every=7", "optimizer.interval.every=2", "eval.every=100"], [7, 14, 20]),
    ],
)
def test_a_checkpoint_of_a_step_is_made_once(finished, words, steps):
    checkpoints = [event for event in finished(*words).events() if event["event"] == "checkpoint"]
    assert [(event["step"], event["name"]) for event in checkpoints] == [(step, f"step-{step:08d}") for step in steps]
    assert all(event["held"] > 0 and event["seconds"] > 0 for event in checkpoints)


def test_the_best_evaluation_leaves_a_checkpoint_that_stays(finished, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 1.5])
    evaluate = Pretrain.evaluate
    monkeypatch.setattr(
        Pretrain, "evaluate", lambda self, last: evaluate(self, last) | {"validation_loss": next(losses)}
    )
    record = finished("optimizer=adamw", "eval.every=5", "checkpoint.every=15")
    assert steps_of(record, "checkpoint") == [5, 10, 15, 20]
    assert sorted(d.name for d in (record.directory / "checkpoints").iterdir()) == ["step-00000010", "step-00000020"]
    assert record.summary()["best_validation_loss"] == {"step": 10, "value": 1.0}


@pytest.mark.parametrize(("log_every", "evaluates"), [(1, 100), (4, 100), (100, 100), (100, 10)])
def test_the_step_whose_loss_is_no_number_is_named(settings, poison, log_every, evaluates, tally):
    poison(6)
    chosen, choices = settings(f"trainer.log_every={log_every}", f"eval.every={evaluates}", "optimizer.interval=50")
    with pytest.raises(TrainingError, match=r"^the loss is nan at step 6: lower optimizer.lr"):
        run(chosen, choices)
    (file,) = Path(chosen.run_root).glob("*/*/status.json")
    record = Record(file.parent)
    assert record.status == "failed"
    (event,) = [event for event in record.events() if event["event"] == "nonfinite"]
    assert (event["step"], event["rows"]) == (6, list(range(40, 48)))
    assert math.isnan(event["loss"])
    tally("faults: a loss that is no number")


@pytest.mark.parametrize(("kind", "words"), [(math.nan, "optimizer=adamw"),
                                             (math.inf, "optimizer.interval.source=training")])  # fmt: skip
def test_a_step_can_be_left_out(finished, poison, kind, words):
    """Weights, optimizer and learning rate stand still, and no mean has the loss in it."""
    poison(1, 6, 7, kind=kind)
    skips = ["trainer.on_nonfinite=skip", "trainer.log_every=1", "trainer.micro_batch_size=4", "checkpoint.every=5"]
    record = finished(*skips, words)
    lines = record.metrics()
    assert [line["step"] for line in lines if math.isnan(line["loss"])] == [1, 6, 7]
    assert steps_of(record, "nonfinite") == [1, 6, 7]
    assert record.summary()["skips"] == 3
    rates = {line["step"]: line["lr"] for line in lines}
    assert rates[5] != rates[6] == rates[7] == rates[8] != rates[9]


def test_the_number_of_steps_left_out_is_bounded(finished, poison):
    poison(*range(3, 20))
    says = r"the loss is nan at step 7, and 4 steps were left out before \(trainer.max"
    with pytest.raises(TrainingError, match=says):
        finished("trainer.on_nonfinite=skip", "trainer.max_skips=4")


def test_a_checkpoint_of_other_settings_is_refused_and_they_are_listed(settings, tmp_path):
    one, choices = settings("optimizer=adamw", "optimizer.lr=0.01", "trainer.clip_norm=1.0")
    other, _ = settings("optimizer=adamw", "optimizer.lr=0.02", "seed=3")
    record, _ = run(one, choices)
    record.set_status("running")
    theirs = identify(other, choices).directory
    record.directory.rename(theirs)
    with pytest.raises(SettingError) as caught:
        run(other, choices)
    listed = "optimizer.lr (0.01; now 0.02), seed (default; now 3), trainer.clip_norm (1.0; now default)"
    assert f"is of a run with other settings: {listed}; remove that directory" in str(caught.value)
    assert len(list(theirs.glob("checkpoints/step-*"))) == 1, "nothing of it is lost"


@pytest.mark.parametrize("overrides", [["optimizer.subspace=columns"], ["optimizer=adamw"]])
def test_a_run_killed_between_its_last_checkpoint_and_its_summary_is_finished_by_the_next_start(settings, overrides):
    chosen, choices = settings(*overrides)
    record, _ = run(chosen, choices)
    before = record.summary()
    record.set_status("running")
    (record.directory / "summary.json").unlink()
    record, outcome = run(chosen, choices)
    assert outcome == "finished"
    assert run(chosen, choices)[1] == "finished before"
    timed = ("seconds", "optimizer_share", "memory")
    after = record.summary()
    assert {k: v for k, v in after.items() if k not in timed} == {k: v for k, v in before.items() if k not in timed}
    assert after["seconds"]["forward"] == pytest.approx(before["seconds"]["forward"])


def test_the_last_evaluation_may_read_more_and_is_compared_with_no_other(finished, pretrain):
    record = finished("optimizer=adamw", "eval.every=5", "eval.tokens=320", "eval.last_tokens=1280")
    evaluated = [line for line in record.metrics() if "validation_loss" in line]
    assert [line["step"] for line in evaluated] == [5, 10, 15, 20]
    summary, (task, _) = record.summary(), pretrain("eval.tokens=1280")
    saved = load_file(record.directory / "checkpoints" / "step-00000020" / "model.safetensors")
    task.model.load_state_dict(saved, strict=True)
    assert task.evaluate(last=False)["validation_loss"] == summary["validation_loss"]
    best = min(evaluated[:-1], key=lambda line: line["validation_loss"])
    assert summary["best_validation_loss"] == {"step": best["step"], "value": best["validation_loss"]}


def test_the_rate_that_is_written_is_the_whole_one(finished):
    words = ["optimizer=adamw", "optimizer.split_lr_scale=0.25", "schedule=constant", "schedule.warmup=0"]
    assert {line["lr"] for line in finished(*words).metrics()} == {1e-3}


class ReadsOfTheDevice(TorchDispatchMode):
    """Counts how often a number is read from a tensor: on a GPU each waits for all that was launched before."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("words", ["optimizer=adamw", "optimizer=frugal", "optimizer.subspace=slab"])
def test_a_step_reads_nothing_from_the_device(loop, words):
    built = loop(words, "trainer.log_every=100", "trainer.clip_norm=1.0", "trainer.micro_batch_size=4")
    advance(built)  # which chooses the subspace
    work = built.task.work(2)
    with ReadsOfTheDevice() as reads:
        built._train_step(work)
    assert reads.count == 0


@pytest.mark.gpu
@pytest.mark.parametrize("words", [["optimizer=adamw"], ["optimizer=frugal", "optimizer.interval=50"]], ids=str)
def test_a_step_on_a_gpu_waits_for_nothing(loop, words):
    built = loop(*words, "trainer.log_every=100", "eval.every=100")
    built.compile(print)
    advance(built, steps=2)
    work = built.task.work(3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        built.advance(work)
    finally:
        torch.cuda.set_sync_debug_mode("default")
