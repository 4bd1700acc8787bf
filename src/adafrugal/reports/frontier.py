"""Draw quality against memory, with all arms of a table in one picture."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adafrugal.reports import labels, lengths
from adafrugal.reports.statistics import Sample

if TYPE_CHECKING:
    from adafrugal.reports.arms import Job
    from adafrugal.reports.plan import Section

FAR = 0.2  # nats above the best and the reference
TOP = 1.05  # of the reference's steps
MARKERS = "osDv^<>Ph"  # one fewer than colors, so that ninety arms differ
STATE = "optimizer state (MiB): hollow at the start, filled at the end; bars: 95% intervals of means"


@dataclass(frozen=True)
class Point:
    """An arm in a panel."""

    text: str
    job: Job
    height: float
    bar: tuple[float, float] | None  # its ends
    place: int  # among the arms: its color and marker


def draw(axes: Any, section: Section) -> None:
    """Draw each arm's loss; for runs of several lengths, also the steps that it needs to the reference's loss."""
    reference, panels = section.shown(section.reference[0]) if section.reference else "", [axes]
    jobs = {job.name: job for job in section.rows.values()}
    if section.kind == "lengths":
        panels, found = axes, lengths.arms(section.jobs)
        whole = max(found[reference])
        jobs = {name: by_steps[whole] for name, by_steps in found.items() if whole in by_steps}
    arms = {name: job for name, job in jobs.items() if job.runs}
    sizes = (size for job in arms.values() for size in _state(job))
    panels[-1].set(xlim=(0, 1.08 * max(sizes, default=1)))
    panels[-1].set_xlabel(STATE, fontsize=9)
    _losses(panels[0], arms, arms.get(reference))
    if section.kind == "lengths":
        reached = {name: lengths.reached(found[name], jobs[reference], whole) for name in arms}
        _shares(panels[1], arms, {name: at for name, at in reached.items() if at and name != reference}, reference)


def _state(job: Job) -> list[float]:
    """Return the optimizer's state in MiB at the start and at the end, means over seeds."""
    sizes = job.numbers("state_bytes")
    return [statistics.mean(size[when] for size in sizes) / 2**20 for when in ("start", "end")]


def _losses(axes: Any, arms: Mapping[str, Job], reference: Job | None) -> None:
    """Draw the losses; those far above the others at the upper edge, to keep the others apart."""
    samples = {name: Sample.of(job.numbers("validation_loss")) for name, job in arms.items()}
    best = min(sample.mean for sample in samples.values())
    line = Sample.of(reference.numbers("validation_loss")).mean if reference else best
    near = {name: sample for name, sample in samples.items() if sample.mean <= max(best, line) + FAR}
    ends = [end for sample in near.values() for end in sample.interval or (sample.mean,)]
    lowest, highest = max(min(ends), best - FAR), min(max(ends), max(best, line) + 2 * FAR)
    margin = 0.05 * (highest - lowest) or 0.01 * best
    lowest, highest = lowest - margin, highest + margin
    points = []
    for place, (name, sample) in enumerate(samples.items()):
        text, height = (name, sample.mean) if name in near else (f"{name}, {sample.mean:.2f} (above)", highest)
        points.append(Point(text, arms[name], height, sample.interval if name in near else None, place))
    axes.set(ylim=(lowest, highest), ylabel="validation loss (nats per token)")
    _points(axes, points, line if reference else None)


def _shares(axes: Any, arms: Mapping[str, Job], reached: Mapping[str, lengths.Reached], reference: str) -> None:
    """Draw steps to the reference's loss as shares of its own; those below the shortest length at the lower edge."""
    bottom = 0.95 * min((at.shortest for at in reached.values()), default=1)
    places = {name: place for place, name in enumerate(arms)}
    points, never = [], []
    for name, at in reached.items():
        if math.isinf(at.share):
            never.append(name)
        else:
            bar = tuple(min(max(end, bottom), TOP) for end in at.interval) if at.interval else None
            text = name if at.share else f"{name}, {at.text(at.share)}"
            points.append(Point(text, arms[name], max(at.share, bottom), bar, places[name]))
    if reference in arms:
        points.append(Point(reference, arms[reference], 1, None, places[reference]))
    axes.set(ylim=(bottom, TOP), ylabel=f"steps to {reference}'s loss")
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    if never:
        axes.set_title("\n".join(textwrap.wrap(f"not reached: {', '.join(never)}", 100)), fontsize=labels.FONT)
    _points(axes, points, 1)


def _points(axes: Any, points: Sequence[Point], line: float | None) -> None:
    """Draw points within the axes' limits, with their names, and a line at the reference's height."""
    names, drawn = [], []
    if line is not None:
        axes.axhline(line, color="grey", linestyle="--", linewidth=0.8, zorder=0)
        drawn.append([(x, line) for x in axes.get_xlim()])
    for point in sorted(points, key=lambda point: point.height):
        (start, end), height, color = _state(point.job), point.height, f"C{point.place % 10}"
        more = {"marker": MARKERS[point.place % len(MARKERS)], "color": color, "markersize": 6, "clip_on": False}
        axes.plot([start, end], [height, height], color=color, alpha=0.4)
        axes.plot([start], [height], markerfacecolor="white", **more)
        axes.plot([end], [height], **more)
        if point.bar:
            axes.vlines([end], *point.bar, color=color, linewidth=1.2)
        names.append((end, height, point.text, color))
        drawn += [[(end, y) for y in point.bar or (height,)], [(start, height), (end, height)]]
    labels.write(axes, names, drawn)
