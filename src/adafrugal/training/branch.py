"""How a run begins that goes on from another run's checkpoint; `settings.past` says which may."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adafrugal.optim import Control
from adafrugal.settings import checkpoint_names
from adafrugal.settings.identity import digest
from adafrugal.settings.past import has_state
from adafrugal.system.errors import SettingError, TrainingError
from adafrugal.training.checkpoints import checkpoint
from adafrugal.training.loop import Loop
from adafrugal.training.progress import Progress


def state_of(source: Path, is_first: bool) -> dict[str, Any]:
    """Load the state of another run's checkpoint as that of a run which begins with it; rank 0 looks for damage.

    Raises:
        SettingError: the checkpoint is of another run than its directory says.
        TrainingError: it is damaged, or another version of this code wrote it.
    """
    run, step = source.parents[1], checkpoint_names.step(str(source))
    if is_first and (damage := checkpoint.damage(source)) is not None:
        raise TrainingError(f"trainer.continue_from is {source}, which is damaged ({damage}); name a whole checkpoint")
    state = checkpoint.load_state(source)
    with _of_this_version():
        key, progress = digest(state["settings"]), Progress.from_state(state["account"])
        # the unigram loss is of the validation text, whose length may differ
        task = {name: value for name, value in state["task"].items() if name != "unigram_loss"}
    if key != run.name.rpartition("-")[2] or progress.step != step:
        where = "a checkpoint where its run saved it"
        raise SettingError(f"trainer.continue_from is {source}, which is of another run or step; allowed: {where}")
    begins = {"run": run.name, "step": step, "code": checkpoint_names.recorded(run).get("code")}
    return {**state, "account": progress.branched(begins).state_dict(), "task": task}


def begin(loop: Loop, state: Mapping[str, Any], source: Path) -> None:
    """Let a loop go on from `state_of` a checkpoint, by its own schedule, and own controls where these have no state.

    What a control made of the losses that it observed is in the checkpoint.
    """
    if loop.settings.optimizer.kind == "frugal":
        with _of_this_version():
            state = {**state, "optimizer": _with_controls(state["optimizer"], loop.optimizer.param_groups)}
    loop.resume(state, source)
    scheduler = loop.scheduler
    scheduler.last_epoch -= 1  # the next step's rate is this schedule's
    scheduler.step()
    scheduler._step_count -= 1  # which was one of the steps made


@contextmanager
def _of_this_version() -> Iterator[None]:
    """Turn what is missing or other in a checkpoint of another version into one line."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise checkpoint.of_another_version(error) from error


def _with_controls(saved: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    made = []
    for theirs, ours in zip(saved["param_groups"], groups, strict=True):
        given = {name: ours[name] for name in ("density", "interval") if isinstance(ours.get(name), Control)}
        made.append({**theirs, **{name: own.state_dict() for name, own in given.items() if not has_state(own)}})
    return {**saved, "param_groups": made}
