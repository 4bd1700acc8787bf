import copy

import pytest
import torch
from small import adafrugal, llama, rows
from torch import nn

from adafrugal.optim import Constant, Frugal, LossAware, split_parameters

pytest.importorskip("accelerate", reason="accelerate is an extra: make extras")
from transformers import Trainer, TrainerCallback, TrainingArguments

from adafrugal.integrations.transformers import AdaFrugalCallback, frugal_cls_and_kwargs, frugal_for
from adafrugal.integrations.watch import find_frugal, observes_every


def arguments(directory, **changed):
    return TrainingArguments(
        str(directory),
        **{
            "max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 0.01, "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0, "eval_strategy": "steps", "eval_steps": 3, "save_strategy": "no", "logging_steps": 1,
            "report_to": "none", "disable_tqdm": True, "use_cpu": True, "train_sampling_strategy": "sequential",
        } | changed,
    )  # fmt: skip


def trainer(args, *, model=None, optimizer=None, callbacks=None, **given):
    model = model or llama()
    if "optimizer_cls_and_kwargs" not in given:
        given["optimizers"] = (optimizer or frugal_for(model, args, **adafrugal()), None)
    callbacks = [AdaFrugalCallback()] if callbacks is None else callbacks
    return Trainer(model, args, train_dataset=rows(64), **{"eval_dataset": rows(4)} | given, callbacks=callbacks)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def stack(some):
    return {key: torch.stack([row[key] for row in some]) for key in some[0]}


def in_ones_own_loop(steps, accumulation, rate):
    """What the trainer should do: Frugal's step after every `accumulation` batches, a loss at every second step."""
    model = llama()
    optimizer = Frugal(split_parameters(model), **adafrugal(lr=rate))
    batches = (rows(64)[i : i + 2] for i in range(0, 64, 2))
    for step in range(1, steps + 1):
        window = [stack(next(batches)) for _ in range(accumulation)]
        tokens = sum((batch["labels"][:, 1:] != -100).sum() for batch in window)
        for batch in window:
            model(**batch, num_items_in_batch=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 2 == 0:
            with torch.no_grad():
                optimizer.observe(model.eval()(**stack(rows(4))).loss.item())
            model.train()
    return model, optimizer


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_trainer_does_what_ones_own_loop_does(tmp_path, accumulation):
    """Evaluations at 3 and 6 are the trainer's own. Losses are observed at 2, 4, 6 optimizer steps.

    All tokens of a step weigh alike, however many a batch has.
    """
    ours = trainer(arguments(tmp_path, gradient_accumulation_steps=accumulation, per_device_eval_batch_size=4))
    ours.train()
    model, optimizer = in_ones_own_loop(6, accumulation, 0.01)
    assert same(ours.model, model)
    found = find_frugal(ours.optimizer)
    assert (found.density, found.interval) == (optimizer.density, optimizer.interval) == (pytest.approx(0.225), 9)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_continues_bit_for_bit(tmp_path, accumulation, recwarn):
    """The evaluation as the resumed run starts is not observed, nor are those at other steps."""
    changed = {"max_steps": 8, "eval_steps": 1, "eval_on_start": True, "gradient_accumulation_steps": accumulation,
               "lr_scheduler_type": "linear", "warmup_steps": 4}  # fmt: skip
    whole = trainer(arguments(tmp_path, save_strategy="steps", save_steps=3, **changed))
    whole.train()
    other = trainer(arguments(tmp_path / "other", restore_callback_states_from_checkpoint=True, **changed))
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(whole.model, other.model)
    a, b = (find_frugal(each.optimizer) for each in (whole, other))
    assert (a.interval, a.density, a.checksum()) == (b.interval, b.density, b.checksum())
    assert a.interval == 27
    names = ("step", "loss", "density", "interval", "state_bytes")
    lines = [[[line.get(k) for k in names] for line in each.state.log_history if "density" in line]
             for each in (whole, other)]  # fmt: skip
    assert lines[0] == lines[1] and len(lines[0]) == 8
    assert not [str(warned.message) for warned in recwarn if "saved state" in str(warned.message)]


def test_settings_that_a_resumed_run_would_lose_are_listed(tmp_path):
    trainer(arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=2)).train()
    other = trainer(arguments(tmp_path / "other", max_steps=2, weight_decay=0.3))
    with pytest.warns(UserWarning, match=r"the saved state replaces settings .*weight_decay"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_the_log_and_trackers_have_density_interval_and_bytes(tmp_path):
    logged = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            logged.append(dict(logs))

    ours = trainer(arguments(tmp_path, max_steps=2), callbacks=[Tracker(), callback := AdaFrugalCallback()])
    callback.attach(ours)
    ours.train()
    optimizer = find_frugal(ours.optimizer)
    expected = {"density": optimizer.density, "interval": 1, "state_bytes": optimizer.state_bytes().total}
    assert expected.items() <= [line for line in logged if "loss" in line][-1].items()
    assert expected.items() <= [line for line in ours.state.log_history if "loss" in line][-1].items()
    assert ours.callback_handler.callbacks.count(callback) == 1


def test_the_trainer_makes_the_optimizer_itself(tmp_path):
    args = arguments(tmp_path)
    theirs = trainer(args, optimizer_cls_and_kwargs=frugal_cls_and_kwargs(args, **adafrugal()))
    theirs.train()
    ours = trainer(args)
    ours.train()
    assert same(theirs.model, ours.model)


def test_rates_are_those_of_the_arguments_unless_given(tmp_path):
    args = arguments(tmp_path, learning_rate=0.5, weight_decay=0.2, adam_beta2=0.95, adam_epsilon=1e-6)
    optimizer = frugal_for(llama(), args, eps=1e-7)
    names = ("lr", "betas", "eps", "weight_decay")
    assert [optimizer.param_groups[0][name] for name in names] == [0.5, (0.9, 0.95), 1e-7, 0.2]
    factory, options = frugal_cls_and_kwargs(args, eps=1e-7)
    assert [options[name] for name in names] == [0.5, (0.9, 0.95), 1e-7, 0.2]
    assert factory()(llama(), args, **options).defaults["lr"] == 0.5, "axolotl passes its arguments, too"
    with pytest.raises(ValueError, match=r"transformers 5\.2 is needed"):
        factory([{"params": []}], **options)  # as transformers 5.0 calls it


def test_a_class_for_which_the_trainer_makes_the_groups_is_refused(tmp_path):
    args = arguments(tmp_path)
    refused = trainer(args, optimizer_cls_and_kwargs=(Frugal, {"lr": 0.01}))
    with pytest.raises(
        ValueError, match=r"nothing would be split, as when a trainer makes .* split_parameters\(model\)"
    ):
        refused.train()


def test_what_cannot_be_observed_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"one Frugal is needed; the trainer's optimizers are Accelerated.*, AdamW"):
        trainer(arguments(tmp_path), optimizer=torch.optim.AdamW(nn.Linear(1, 1).parameters())).train()
    with pytest.raises(ValueError, match="eval_strategy is 'no', and the interval depends on the evaluation loss"):
        trainer(arguments(tmp_path, eval_strategy="no")).train()
    sets = {"a": rows(4), "b": rows(4)}
    with pytest.raises(ValueError, match="no eval_loss; it has eval_a_loss, eval_b_loss: AdaFrugalCallback"):
        trainer(arguments(tmp_path, max_steps=2), eval_dataset=sets).train()
    observed = trainer(
        arguments(tmp_path, max_steps=4), eval_dataset=sets, callbacks=[AdaFrugalCallback("eval_b_loss")]
    )
    observed.train()
    assert find_frugal(observed.optimizer).interval == 3
    model = llama()
    rare = frugal_for(model, **adafrugal(interval=LossAware(1, 50)))
    with pytest.warns(UserWarning, match="observed after 5000 steps, the run has 2; set every"):
        trainer(arguments(tmp_path, max_steps=2), model=model, optimizer=rare).train()


def test_a_constant_interval_needs_no_evaluation(tmp_path):
    model = llama()
    constant = frugal_for(model, **adafrugal(interval=3))
    trainer(arguments(tmp_path, eval_strategy="no"), model=model, optimizer=constant, eval_dataset=None).train()
    assert constant.interval == 3


def test_steps_that_are_left_out_are_not_counted(tmp_path):
    """The third step of the trainer is left out, so its fifth is the optimizer's fourth."""

    class Spoiler(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **_):
            if state.global_step == 2:
                next(model.parameters()).grad.fill_(float("nan"))

    seen = []
    model = llama()
    optimizer = frugal_for(model, **adafrugal(nonfinite="skip"))
    optimizer.observe = lambda loss: seen.append(optimizer.param_groups[0]["steps"])
    trainer(arguments(tmp_path), model=model, optimizer=optimizer, callbacks=[Spoiler(), AdaFrugalCallback()]).train()
    assert optimizer.skipped_steps == 1
    assert seen == [2, 4]


def test_every_is_that_of_the_control_that_reads_losses():
    def made(*intervals):
        return Frugal([{"params": [nn.Parameter(torch.ones(2, 2))], "split": True, "interval": i} for i in intervals])

    assert observes_every(made(7)) is None
    assert observes_every(made(7, LossAware(every=30), Constant(3))) == 30
    with pytest.raises(ValueError, match=r"every is \[20, 30\] in several controls"):
        observes_every(made(LossAware(every=30), LossAware(every=20)))
    with pytest.raises(ValueError, match="source is 'training'"):
        observes_every(made(LossAware(source="training")))
    with pytest.raises(ValueError, match="are Frugal, Frugal"):
        find_frugal(made(7), copy.copy(made(7)))
