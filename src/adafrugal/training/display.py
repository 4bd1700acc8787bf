"""The progress of a run on stdout: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from adafrugal.system.secrets import hidden
from adafrugal.tracking.record import spoken

SECONDS_BETWEEN_LINES = 30  # of training metrics, where there is no bar


class _Console(Console):
    """Goes quiet when its pipe is closed, so that the run continues."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # other output goes there, too


class Display:
    """Prints a run's progress. Use as a context; the bar is gone when it ends."""

    def __init__(self) -> None:
        self.console = _Console(highlight=False, soft_wrap=True)
        self._total = 0
        self._last_line = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._task = self._bar.add_task("starting", total=None)
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def expect(self, steps: int) -> None:
        """Set the number of steps of the run."""
        self._total = steps
        if self._bar is not None:
            self._bar.update(self._task, total=steps)

    def say(self, text: str) -> None:
        """Print a line, or several, above the bar."""
        self.console.print(text, markup=False)

    def warn(self, text: str) -> None:
        """Print a warning, in which secrets are hidden."""
        self.console.print(hidden(f"warning: {text}"), style="yellow", markup=False)

    def step(self, step: int) -> None:
        """Show that a step is done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def metrics(self, line: Mapping[str, Any], headline: Sequence[str]) -> None:
        """Show a line of metrics on the bar; print it after an evaluation and, without a bar, now and then.

        `headline` names the numbers of the evaluation to show beside its loss.
        """
        evaluated = "validation_loss" in line
        if self._bar is not None:
            self._bar.update(self._task, description=_short(line))
        if evaluated or (self._bar is None and time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES):
            self._last_line = time.monotonic()
            text = f"step {line['step']:>{len(str(self._total))}}/{self._total}  {_short(line)}"
            if evaluated:
                text += f"  │ validation {line['validation_loss']:.4f}"
                text += "".join(f"  {spoken(name)} {_number(name, line[name])}" for name in headline)
            self.say(text)


def _number(name: str, value: float) -> str:
    return f"{value:.1f}" if name.endswith("perplexity") else f"{value:.4f}"


def _short(line: Mapping[str, Any]) -> str:
    text = f"loss {line['loss']:.3f}"
    if line["density"] is not None:
        text += f"  ρ {line['density']:.3f}  T {line['interval']}"
    text += f"  {line['tokens_per_second']:,.0f} tokens/s"
    return f"{text}  MFU {line['mfu']:.0%}" if "mfu" in line else text
