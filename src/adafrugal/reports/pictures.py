"""The pictures of a table: curves of its arms, and the trade-off between loss and state. SVG, the same to the byte."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adafrugal.reports.jobs import Job
from adafrugal.reports.plan import Section
from adafrugal.tracking.record import Record

PHASES = ("data", "forward", "backward", "optimizer", "refresh", "evaluation", "checkpoint")


def draw(section: Section, directory: Path) -> list[Path]:
    """Draw the pictures that a section names from the runs that it has; none where there are no runs."""
    jobs = [job for job in section.jobs if job.runs]
    files = []
    for name in section.pictures if jobs else ():
        file = directory / f"{section.name}-{name}.svg"
        with _figure(file, name) as axes:
            _DRAWN[name](axes, jobs)
        files.append(file)
    return files


@contextmanager
def _figure(file: Path, name: str) -> Iterator[Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = 2 if name == "controls" else 1
    # words as words: smaller files, and nothing in them that depends on a font's outlines
    with matplotlib.rc_context({"svg.hashsalt": "adafrugal", "svg.fonttype": "none"}):
        figure, axes = pyplot.subplots(panels, sharex=True, figsize=(7, 2 + 2 * panels), layout="constrained")
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
    for place, job in enumerate(jobs):
        summaries = [run.summary() for run in job.runs.values()]
        perplexities = [summary["validation_perplexity"] for summary in summaries]
        start, end = (
            statistics.mean(summary["state_bytes"][when] for summary in summaries) / 2**20 for when in ("start", "end")
        )
        mean = statistics.mean(perplexities)
        spread = statistics.stdev(perplexities) if len(perplexities) > 1 else 0
        axes.plot([start, end], [mean, mean], color=_color(place), alpha=0.4)
        axes.errorbar([end], [mean], yerr=[spread], fmt="o", color=_color(place), capsize=3, label=job.name)
        axes.annotate(job.name, (end, mean), xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    axes.set_xlabel("optimizer state (MiB): a point at the end of the run, a line from its start")
    axes.set_ylabel("validation perplexity")


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


_DRAWN = {"loss": _loss, "tradeoff": _tradeoff, "controls": _controls, "state": _state, "time": _time}
TITLES = {
    "loss": "Training loss",
    "tradeoff": "Perplexity against optimizer state",
    "controls": "Density and interval over the run",
    "state": "Optimizer state over the run",
    "time": "Time by phase",
}
