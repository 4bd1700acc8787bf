"""The pictures of a table: curves of its arms, and the trade-off between loss and state. SVG, the same to the byte."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adafrugal.reports.arms import Job
from adafrugal.reports.plan import Section
from adafrugal.reports.statistics import Sample
from adafrugal.tracking.record import Record

FAR = 1.2  # times the best perplexity
MARKERS = "osDv^<>P"
ROLES = ("moments of what is always state-full", "moments of the subspace", "where the subspace lies, counters")
PHASES = ("data", "forward", "backward", "optimizer", "refresh", "evaluation", "checkpoint")


def draw(section: Section, directory: Path) -> list[Path]:
    """Draw the pictures that a section names from the runs that it has; none where there are no runs."""
    jobs = [job for job in section.jobs if job.runs]
    files = []
    for name in section.pictures if jobs else ():
        file = directory / f"{section.name}-{name}.svg"
        with _figure(file, {"controls": 2, "roles": len(jobs)}.get(name, 1), sharey=name == "roles") as axes:
            _DRAWN[name](axes, jobs)
        files.append(file)
    return files


@contextmanager
def _figure(file: Path, panels: int, sharey: bool) -> Iterator[Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # words as words: smaller files, and nothing in them that depends on a font's outlines
    with matplotlib.rc_context({"svg.hashsalt": "adafrugal", "svg.fonttype": "none"}):
        size = (7, 2 + 2 * panels if panels < 3 else 1 + 1.2 * panels)
        figure, axes = pyplot.subplots(panels, sharex=True, sharey=sharey, figsize=size, layout="constrained")
        yield axes
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, metadata={"Date": None})
        pyplot.close(figure)


def _color(place: int) -> str:
    return f"C{place % 10}"


def _mean_curve(job: Job, read: Callable[[dict[str, Any]], Any]) -> tuple[list[int], list[float]]:
    """Steps, and the mean over seeds of what is read from a line of metrics, where all seeds have it."""
    runs = [{line["step"]: read(line) for line in run.metrics()} for run in job.runs.values()]
    steps = [step for step in runs[0] if all(run.get(step) is not None for run in runs)]
    return steps, [statistics.mean(run[step] for run in runs) for step in steps]


def _loss(axes: Any, jobs: Sequence[Job]) -> None:
    lowest, latest = [], []
    for place, job in enumerate(jobs):
        steps, losses = _mean_curve(job, lambda line: line["loss"])
        axes.plot(steps, losses, color=_color(place), linewidth=1.2, label=job.name)
        lowest.append(min(losses))
        latest.append(losses[len(losses) // 5])
    axes.set_ylim(min(lowest) - 0.1, max(latest) + 0.1)  # the first steps fall from far above
    axes.set_xlabel("step")
    axes.set_ylabel("training loss (nats per token)")
    axes.legend(frameon=False, fontsize=8)


def _tradeoff(axes: Any, jobs: Sequence[Job]) -> None:
    """What is far above the best stands at the upper edge: on a common scale the others would be one point."""
    samples = [Sample.of(run.summary()["validation_perplexity"] for run in job.runs.values()) for job in jobs]
    best = min(sample.mean for sample in samples)
    near = [sample for sample in samples if sample.mean <= FAR * best]
    lowest, highest = min(s.mean - (s.spread or 0) for s in near), max(s.mean + (s.spread or 0) for s in near)
    margin = 0.15 * (highest - lowest) or 0.01 * best
    for place, (job, sample) in enumerate(zip(jobs, samples, strict=True)):
        start, end = (
            statistics.mean(run.summary()["state_bytes"][when] for run in job.runs.values()) / 2**20
            for when in ("start", "end")
        )
        is_near, color = sample.mean <= FAR * best, _color(place)
        height = sample.mean if is_near else highest + margin
        name = f"{job.name}, {sample.mean:.1f}{'' if is_near else ' (above)'}"
        axes.plot([start, end], [height, height], color=color, alpha=0.4)
        axes.errorbar(
            [end], [height], yerr=[sample.spread or 0] if is_near else None, fmt=MARKERS[place % len(MARKERS)],
            color=color, capsize=3, clip_on=False, label=name,
        )  # fmt: skip
    axes.set_ylim(lowest - margin, highest + margin)
    axes.set_xlim(left=0)
    axes.set_xlabel("optimizer state (MiB): a point at the end of the run, a line from its start")
    axes.set_ylabel("validation perplexity")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def _controls(axes: Any, jobs: Sequence[Job]) -> None:
    for place, job in enumerate(jobs):
        for panel, key in zip(axes, ("density", "interval"), strict=True):
            steps, values = _mean_curve(job, lambda line, key=key: line.get(key))
            if steps:
                panel.step(steps, values, color=_color(place), where="post", label=job.name)
    for panel, name in zip(axes, ("density ρ", "interval T (steps)"), strict=True):
        panel.set_ylabel(name)
        panel.set_ylim(bottom=0)
    axes[0].legend(frameon=False, fontsize=8)
    axes[1].set_xlabel("step")


def _state(axes: Any, jobs: Sequence[Job]) -> None:
    for place, job in enumerate(jobs):
        steps, sizes = _mean_curve(job, lambda line: line["state_bytes"] / 2**20)
        axes.step(steps, sizes, color=_color(place), where="post", label=job.name)
    axes.set_xlabel("step")
    axes.set_ylabel("optimizer state (MiB)")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)


def _roles(axes: Any, jobs: Sequence[Job]) -> None:
    """One panel an arm. What is always state-full keeps its size; the rest of the moments is the subspace's."""
    panels = [axes] if len(jobs) == 1 else axes
    for panel, job in zip(panels, jobs, strict=True):
        always = statistics.mean(_always_state_full(run) for run in job.runs.values())
        steps, moments = _mean_curve(job, lambda line: line["state_bytes_by_role"].get("moments", 0))
        _, others = _mean_curve(job, lambda line: line["state_bytes"] - line["state_bytes_by_role"].get("moments", 0))
        stacked = ([always] * len(steps), [size - always for size in moments], others)
        panel.stackplot(steps, *([size / 2**20 for size in sizes] for sizes in stacked), labels=ROLES)
        panel.set_title(job.name, fontsize=9, loc="left")
    panels[0].legend(frameon=False, fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.2))
    panels[len(jobs) // 2].set_ylabel("optimizer state (MiB)")
    panels[-1].set_xlabel("step")


def _always_state_full(run: Record) -> float:
    """Bytes of the moments of embeddings, norms and head; of all tensors where an optimizer splits nothing."""
    summary = run.summary()
    return summary["state_bytes"]["end_by_role"].get("moments", 0) - summary.get("split_moments", {"bytes": 0})["bytes"]


def _memory(axes: Any, jobs: Sequence[Job]) -> None:
    for place, job in enumerate(jobs):
        steps, sizes = _mean_curve(job, lambda line: _in_use(line.get("memory", {})))
        axes.plot(steps, sizes, color=_color(place), label=job.name)
    axes.set_xlabel("step")
    axes.set_ylabel("MiB: a GPU's peak since the last point,\nor what the process holds on a CPU")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)


def _in_use(memory: dict[str, float]) -> float | None:
    found = memory.get("peak", memory.get("resident"))
    return None if found is None else found / 2**20


def _time(axes: Any, jobs: Sequence[Job]) -> None:
    """Of each run as shares of its own forward and backward: seconds of different runs do not compare."""
    left = [0.0] * len(jobs)
    for place, phase in enumerate(PHASES):
        widths = [statistics.mean(_phase_share(run, phase) for run in job.runs.values()) for job in jobs]
        axes.barh(range(len(jobs)), widths, left=left, color=_color(place), label=phase)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(jobs)), [job.name for job in jobs])
    axes.invert_yaxis()
    axes.set_xlabel("time ÷ that of the same run's forward and backward")
    axes.legend(frameon=False, fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1))


def _phase_share(run: Record, phase: str) -> float:
    seconds = run.summary()["seconds"]
    return seconds.get(phase, 0.0) / (seconds["forward"] + seconds["backward"])


_DRAWN = {
    "loss": _loss, "tradeoff": _tradeoff, "controls": _controls, "state": _state, "roles": _roles, "memory": _memory,
    "time": _time,
}  # fmt: skip
TITLES = {
    "loss": "Training loss",
    "tradeoff": "Perplexity against optimizer state",
    "controls": "Density and interval over the run",
    "state": "Optimizer state over the run",
    "roles": "What the optimizer state is of",
    "memory": "Memory over the run",
    "time": "Time by phase",
}
