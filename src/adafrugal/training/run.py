"""A run in this process: device, task, optimizer and loop, from a session to its outcome."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from adafrugal.memory import breakdown, card, estimate, fit, measure, on_device
from adafrugal.memory.fit import Fitted
from adafrugal.models import optimizers
from adafrugal.settings.canonical import settled
from adafrugal.settings.compose import refuse_impossible
from adafrugal.settings.identity import differing, still_part
from adafrugal.settings.schema import Settings
from adafrugal.system import allocator
from adafrugal.system.errors import RunError
from adafrugal.tracking import environment
from adafrugal.training import branch, devices, lineage, tasks
from adafrugal.training.checkpoints import checkpoint
from adafrugal.training.devices import Place
from adafrugal.training.display import Display
from adafrugal.training.loop import Loop
from adafrugal.training.progress import Progress
from adafrugal.training.session import Outcome, Session, unless_at_once
from adafrugal.training.tasks.task import Task

_begun = itertools.count()  # runs of this process


class Run:
    """Makes a session's run."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.settings, self.record, self.ranks = session.settings, session.record, session.ranks
        self.display = Display()
        self._memory_before = 0
        self._is_alone = False  # it is the first run of its process, from its first step on

    def train(self) -> Outcome:
        """Train to the end, or until asked to stop."""
        session, notes = self.session, []
        # before any other use of CUDA, and before the record changes
        place = devices.open_device(self.settings.trainer, self.ranks.local, notes.append)
        self.record.begin(session.config())
        session.begun = True
        session.ends.enter_context(self.display)
        for note in notes:
            self._warn(note)
        loop = self._set_up(place)
        session.ends.push(unless_at_once(loop.close))
        session.stop.training = True
        loop.wait_for_data(session.stop)  # what the text alone shows to be wrong is refused before the run begins
        self._describe(loop)
        self._copy_record()
        outcome: Outcome = "finished" if loop.fit(session.stop) else "interrupted"
        if outcome == "finished":
            summary = loop.summary()
            if self.ranks.first:
                summary["memory"] |= self._growth(summary["memory"]["peak_of_the_run"], place)
                self._add_estimate(summary)
                self.record.write_summary(summary)
        self.record.set_status(outcome, step=loop.progress.step)
        if outcome == "interrupted":
            self.display.say(f"interrupted after step {loop.progress.step}; the same command continues the run")
        return outcome

    def _warn(self, text: str) -> None:
        """Record and show what went wrong without ending the run."""
        with suppress(OSError):  # a full disk
            self.record.add_event("warning", text=text)
        self.display.warn(text)

    # -- before the first step ------------------------------------------------------------------------------------

    def _set_up(self, place: Place) -> Loop:
        """Build all parts of the run, print its groups, and resume from the latest checkpoint."""
        settings, display = self.settings, self.display
        saved, state = self._beginning()
        if state is not None and settings.trainer.precision == "auto":  # the run keeps its first
            place = replace(place, precision=state["precision"])
        self._memory_before = measure.begin(place.device)
        self._is_alone = next(_begun) == 0 and saved is None
        settings = self._on_device(place)
        task = self._task(settings, place, state and state["task"])
        settings = settled(settings, task.epoch, task.model.config.hidden_size)
        refuse_impossible(settings)
        settings, fitted = self._within_budget(settings, state)
        self.session.made = settings
        display.expect(settings.trainer.steps)

        optimizers.adapt(settings, task.model)
        groups = optimizers.groups(settings, task.model)
        optimizer = optimizers.build(settings, groups)
        known_as, progress = differing(self.settings), Progress(fitted_density=fitted and fitted.density)
        loop = Loop(settings, task, optimizer, self.record, display, known_as, progress)
        display.say(f"{self.session.identity.key} → {self.record.directory}\n\n{groups}\n")
        if saved is not None:
            is_own = saved.parent == self.record.directory / "checkpoints"
            (loop.resume(state, saved) if is_own else branch.begin(loop, state, saved))
            display.say(f"continuing {'' if is_own else saved.parents[1].name + ' '}after step {loop.progress.step}")
        self.record.go_back_to(loop.progress.step)
        if fitted is not None:
            self.record.add_event("fitted", step=1, **asdict(fitted))
        loop.compile(self._warn)
        if loop.compilation.mode:  # the next run of a sweep needs the memory, and torch compiles a function 8 times
            self.session.ends.callback(torch.compiler.reset)
        return loop

    def _beginning(self) -> tuple[Path | None, dict[str, Any] | None]:
        """The checkpoint to go on from, and its state: this run's latest, else that of `trainer.continue_from`."""
        saved, other = self._latest_checkpoint(), self.settings.trainer.continue_from
        if saved is not None:
            state = checkpoint.load_state(saved)
            _refuse_another(state, differing(self.settings), self.record.directory)
            return saved, state
        if other is not None:
            return Path(other), branch.state_of(Path(other), self.ranks.first)
        if line := lineage.shorter(self.settings, self.session.identity):
            self.display.say(line)
        return None, None

    def _latest_checkpoint(self) -> Path | None:
        """The checkpoint to continue from; rank 0 looks, and puts damaged ones aside."""
        found = checkpoint.latest(self.record.directory / "checkpoints", self._warn) if self.ranks.first else None
        told = self.ranks.tell(found and str(found))
        return Path(told) if told else None

    def _on_device(self, place: Place) -> Settings:
        """The settings completed for the device: precision, micro-batch, rows of logits."""
        settings, size = tasks.sized(self.settings), self.ranks.size
        free = min(self.ranks.gather(place.free()))
        chooses = place.is_gpu and on_device.chooses_micro_batch(settings)
        if chooses:
            self.display.say("estimating which micro-batch fits: seconds, for 7B a minute")
        try:
            found = on_device.resolved(settings, place.precision, place.memory(), free, size)
        except Exception as error:  # of any kind: a run must start although its estimate fails
            self._warn(f"the micro-batch is the whole batch, since there is no estimate to choose it by: {error}")
            whole = replace(settings.trainer, micro_batch_size=settings.trainer.batch_size)
            return on_device.resolved(replace(settings, trainer=whole), place.precision, place.memory(), free, size)
        if chooses and (rows := found.trainer.micro_batch_size) < settings.trainer.batch_size // size:
            fits = f"by the estimate more do not fit into {free / 2**30:.1f} GiB"
            self.display.say(f"micro-batches of {rows} rows: {fits}")
        return found

    def _task(self, settings: Settings, place: Place, state: dict[str, Any] | None) -> Task:
        """The task, continued from `state`."""
        task = tasks.named(settings.task.kind)(settings, place, self.display.say, state, self.ranks)
        self.session.ends.push(unless_at_once(task.close))
        return task

    def _within_budget(self, settings: Settings, state: Mapping[str, Any] | None) -> tuple[Settings, Fitted | None]:
        """The settings with a density that fits the budget that they may have, and the choice if it is made now."""
        if card.of_settings(settings) is None:
            return settings, None
        if state is not None:
            return fit.beginning_with(settings, state["account"]["fitted_density"]), None
        found = fit.fitted(self._undivided(settings))
        self.display.say(breakdown.chosen(settings, found))
        return fit.beginning_with(settings, found.density), found

    def _undivided(self, settings: Settings) -> Settings:
        """Settings for the estimate: those of a single process, which divides nothing."""
        if self.ranks.size > 1:
            return settings
        return replace(settings, trainer=replace(settings.trainer, parallel="none", replicas=1))

    def _describe(self, loop: Loop) -> None:
        """Record the environment; set status to running."""
        here = {"device": loop.place.name(), "precision": loop.place.precision}
        here |= loop.compilation.decided(loop.settings)
        if loop.place.is_gpu and (configured := allocator.configured()) is not None:
            here["allocator"] = configured
        if self.ranks.size > 1:
            here |= {"processes": self.ranks.size, "parallel": self.settings.trainer.parallel}
        found = environment.describe() | here | {"data": loop.task.data}
        if loop.progress.origin is not None:
            found["continued_from"] = loop.progress.origin
        found["identity"] = asdict(self.session.identity) | {"differs": loop.known_as}
        del found["identity"]["directory"]
        self.record.write_config(self.session.config())
        self.record.write_environment(found)
        self.record.add_event("start", step=loop.progress.step, code=found["code"], **here)
        self.record.set_status("running")

    def _copy_record(self) -> None:
        """Copy the record to W&B or for TensorBoard until the run ends, if the settings ask for it."""
        if self.settings.tracking.kind == "local" or not self.ranks.first:
            return
        from adafrugal.tracking.copying import Copy

        identity = self.session.identity
        copy = Copy(self.settings.tracking, self.record, identity.key, identity.labels, self._warn)
        self.session.ends.push(unless_at_once(lambda: copy.finish(0 if self.record.status == "finished" else 1)))

    # -- after the last -------------------------------------------------------------------------------------------

    def _growth(self, peak: int, place: Place) -> dict[str, Any]:
        """What the run took at its peak: on a GPU of tensors, on a CPU of all memory of the process.

        A CPU's process keeps memory of earlier runs and uses it again, so that only its first run is measured.
        """
        grown = {"grown": peak - self._memory_before} if place.is_gpu or self._is_alone else {}
        return {"alone": self._is_alone} | grown

    def _add_estimate(self, summary: dict[str, Any]) -> None:
        """Add the estimate of `python -m adafrugal.memory` to the memory that was measured."""
        if self.settings.trainer.offload or self.settings.trainer.replicas > 1:  # the first cannot make groups alone
            return
        try:
            foretold = estimate.estimate(self._undivided(self.session.made)).peak
        except Exception as error:  # of any kind: a finished run must not fail because its estimate fails
            self._warn(f"there is no estimate of the memory in the summary: {error}")
            return
        memory = summary["memory"]
        if (grown := memory.get("grown", 0)) > 0:
            memory["estimate_error"] = foretold.total / grown - 1
        memory |= {"estimate": foretold.total, "estimate_phase": foretold.phase}
        memory["is_upper_bound"] = summary["compile"] is not None


def _refuse_another(state: Mapping[str, Any], ours: Mapping[str, Any], directory: Path) -> None:
    """Refuse a checkpoint of another run: a directory can be renamed, or copied over another."""
    if "settings" not in state:
        raise checkpoint.of_another_version("it has no settings")
    theirs = still_part(state["settings"])
    names = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if names:
        listed = ", ".join(f"{name} ({theirs.get(name, 'default')}; now {ours.get(name, 'default')})" for name in names)
        raise RunError(
            f"the checkpoint in {directory} is of a run with other settings: {listed}; remove that directory, "
            "or set another run_root"
        )
