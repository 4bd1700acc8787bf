"""Draw the losses of a table's arms over their steps: means over seeds, at the same steps for every arm."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adafrugal.reports import best
from adafrugal.tracking.record import Record

if TYPE_CHECKING:
    from adafrugal.reports.arms import Job
    from adafrugal.reports.plan import Section

STEEP = 5  # the first 1/5 of the points may be above the picture, since losses fall steeply at first
FEW = 12  # points, which are marked
LINES = ("-", "--", ":")  # of the arms, in tens
Losses = Mapping[int, float]  # step -> loss


@dataclass(frozen=True)
class _Curve:
    """The losses of a run by step, from its lines of metrics."""

    begin: int  # step with which the run began: that of the checkpoint for one that continues another
    losses: Losses

    @classmethod
    def of(cls, run: Record, key: str) -> _Curve:
        begin = (run.summary().get("continued_from") or {}).get("step", 0)
        return cls(begin, {line["step"]: line[key] for line in run.metrics() if key in line})

    def covers(self, step: int) -> bool:
        """Whether the run made this step, and has a loss of it or of a later one."""
        return self.begin < step <= max(self.losses, default=self.begin)

    def merged(self, ends: Collection[int]) -> Losses:
        """Return the mean loss of the steps up to each end, since the end before; left out if none has a number."""
        found: dict[int, float] = {}
        summed, count, before = 0.0, 0, self.begin
        for step, loss in self.losses.items():
            if math.isfinite(loss):
                summed, count = summed + (step - before) * loss, count + step - before
            before = step
            if step in ends:
                found |= {step: summed / count} if count else {}
                summed, count = 0.0, 0
        return found


def training(axes: Any, section: Section) -> None:
    """Draw training losses: means over windows of steps which are the same for all arms that made them."""
    found = _curves(section, "loss")
    ends = _even(_common(found))
    lengths = set(_lengths(ends))
    of = f"{lengths.pop()} steps up to it" if len(lengths) == 1 else "steps since the point before"
    _draw(axes, section, [(job, [run.merged(set(ends)) for run in runs]) for job, runs in found])
    step_axis(axes, _said(found, f"a point: the mean of the {of}"))
    axes.set_ylabel("training loss (nats per token)")


def validation(axes: Any, section: Section) -> None:
    """Draw validation losses at the steps at which all arms evaluated that made them."""
    found = _curves(section, "validation_loss")
    ends = _common(found)
    kept = lambda run: {step: run.losses[step] for step in ends if run.covers(step)}  # noqa: E731
    _draw(axes, section, [(job, list(map(kept, runs))) for job, runs in found])
    step_axis(axes, _said(found, _last_text(found)))
    axes.set_ylabel("validation loss (nats per token)")


def step_axis(axes: Any, said: str = "") -> None:
    """Make the x axis one of steps, with round whole numbers, and with what is said of the points."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
    axes.set_xlabel("\n".join(part for part in ("step", said) if part), fontsize=9 if said else None)


def _curves(section: Section, key: str) -> list[tuple[Job, list[_Curve]]]:
    jobs = [job for job in section.rows.values() if job.runs]
    return [(job, [_Curve.of(run, key) for run in job.runs.values()]) for job in jobs]


def _common(found: Sequence[tuple[Job, Sequence[_Curve]]]) -> list[int]:
    """Return the steps of which all runs that made them have a loss."""
    runs = [run for _, of_job in found for run in of_job]
    steps = sorted({step for run in runs for step in run.losses})
    return [step for step in steps if all(step in run.losses for run in runs if run.covers(step))]


def _even(ends: Sequence[int]) -> list[int]:
    """Return the ends of windows of the most common length: an evaluation between two of them ends none of its own."""
    counts = Counter(_lengths(ends))
    usual, kept = max(counts, key=lambda length: (counts[length], length)), [0]
    for end in ends:
        if end == ends[-1] or end - kept[-1] >= usual:
            kept.append(end)
    return kept[1:]


def _lengths(ends: Sequence[int]) -> list[int]:
    return [end - start for start, end in itertools.pairwise([0, *ends])]


def _draw(axes: Any, section: Section, found: Sequence[tuple[Job, Sequence[Losses]]]) -> None:
    """Draw a line for each arm, and a band from its lowest to its highest seed."""
    lowest, latest = [], []
    for place, (job, runs) in enumerate(found):
        if not (steps := sorted(set.intersection(*map(set, runs)))):
            continue  # an arm of other lengths, which has no step of these
        values = [[run[step] for run in runs] for step in steps]
        low, mean, high = ([of(each) for each in values] for of in (min, statistics.mean, max))
        color, line = f"C{place % 10}", f"{'o' if len(steps) < FEW else ''}{LINES[place // 10 % len(LINES)]}"
        axes.plot(steps, mean, line, color=color, markersize=3, linewidth=1.2, label=_label(section, job))
        if len(runs) > 1:
            axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
        lowest.append(min(low))
        latest.append(high[len(high) // STEEP])
    margin = 0.05 * (max(latest) - min(lowest)) or 0.1
    axes.set_ylim(min(lowest) - margin, max(latest) + margin)
    axes.legend(frameon=False, fontsize=8, ncols=1 + len(found) // 8)


def _label(section: Section, job: Job) -> str:
    """Return an arm's name, the values that were chosen for it, and its number of seeds."""
    chosen = [best.at(job, section.best_of)] if section.best_of else []
    return ", ".join([job.name, *chosen, f"{len(job.runs)} seed{'s' if len(job.runs) > 1 else ''}"])


def _said(found: Sequence[tuple[Job, Sequence[_Curve]]], about: str) -> str:
    """Return what is said below a picture: of its points, and of the bands if it has any."""
    bands = "lines: means over seeds; bands: from the lowest to the highest seed"
    has_bands = any(len(runs) > 1 for _, runs in found)
    return "\n".join(part for part in (about, bands if has_bands else "") if part)


def _last_text(found: Sequence[tuple[Job, Sequence[_Curve]]]) -> str:
    """Return that the last evaluation read more of the text, if it did: the line has a step there without a cause."""
    evaluation = found[0][0].settings.eval
    if evaluation.last_tokens in (None, evaluation.tokens):
        return ""
    return f"the last point is over {evaluation.last_tokens:,} tokens, the others over {evaluation.tokens:,}"
