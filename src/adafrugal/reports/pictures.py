"""Draw one run, or a table's arms side by side, as SVG; equal records give equal bytes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adafrugal.reports import curves, frontier, losses
from adafrugal.reports.cells import MIB, PHASES
from adafrugal.reports.losses import step_axis
from adafrugal.reports.statistics import Sample
from adafrugal.tracking.record import Record, spoken

if TYPE_CHECKING:
    from adafrugal.reports.arms import Job
    from adafrugal.reports.plan import Section

FAR = 1.2  # × the best perplexity
MARKERS = "osDv^<>P"
ROLES = ("moments of what is always state-full", "moments of the subspace", "where the subspace lies, counters")
LEGEND: dict[str, Any] = {"frameon": False, "fontsize": 8}


@contextmanager
def _figure(file: Path, panels: int, fonttype: str = "none", columns: int = 1, **layout: Any) -> Iterator[Any]:
    """Yield the axes of rows of panels over one x-axis; then write the figure to a file, atomically."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # "none" writes text as text: smaller files, which do not depend on a font's outlines
    with matplotlib.rc_context({"svg.hashsalt": "adafrugal", "svg.fonttype": fonttype}):
        figure, axes = pyplot.subplots(panels, columns, sharex=True, layout="constrained", **layout)
        yield axes
        beside = file.with_name(f".{file.name}.new")
        figure.savefig(beside, format="svg", metadata={"Date": None})
        beside.replace(file)
        pyplot.close(figure)


# -- one run -----------------------------------------------------------------------------------------------------------


def draw_run(record: Record, file: Path) -> None:
    """Draw a run's loss, scores, density, interval and state over its steps."""
    lines, summary = record.metrics(), record.summary() or {}
    steps = [line["step"] for line in lines]
    evaluated = [line for line in lines if "validation_loss" in line]
    at = [line["step"] for line in evaluated]
    metrics = summary.get("metrics", [])
    moving = [] if lines[-1]["density"] is None else ["density", "interval"]
    names = ["loss", *(["scores"] if metrics else []), *moving, "state"]
    size, ratios = (7, 2 + 1.5 * len(names)), [2] + [1] * (len(names) - 1)
    with _figure(file, len(names), "path", figsize=size, height_ratios=ratios) as axes:
        panels = dict(zip(names, axes, strict=True))
        loss, state = axes[0], axes[-1]
        loss.plot(steps, [line["loss"] for line in lines], color="C0", alpha=0.5, label="training")
        validation = [line["validation_loss"] for line in evaluated]
        loss.plot(at, validation, "o-", color="C0", markersize=3, label="validation")
        if "unigram" in summary:
            loss.axhline(summary["unigram"]["loss"], color="grey", linestyle=":", label="unigram model")
        loss.set_ylabel("loss" if metrics else "loss (nats per token)")
        loss.legend(frameon=False)
        begins = summary.get("continued_from")
        begun = f"\nafter step {begins['step']:,} of {begins['run']}" if begins else ""
        loss.set_title(f"{record.directory.parent.name} / {record.directory.name}{begun}", fontsize=10)
        for place, name in enumerate(metrics):
            values, color = [line[name] for line in evaluated], f"C{4 + place % 4}"
            panels["scores"].plot(at, values, "o-", color=color, markersize=3, label=spoken(name))
            panels["scores"].set_ylabel("validation\nscores")
            panels["scores"].legend(frameon=False)
        if moving:
            panels["density"].plot(steps, [line["density"] for line in lines], color="C1")
            panels["interval"].step(steps, [line["interval"] for line in lines], color="C2", where="post")
        state.step(steps, [line["state_bytes"] / MIB for line in lines], color="C3", where="post")
        if summary:
            state.axhline(summary["state_bytes"]["adamw"] / MIB, color="grey", linestyle=":", label="AdamW")
            state.legend(frameon=False)
        labels = {"density": "density ρ", "interval": "interval T\n(steps)", "state": "optimizer state\n(MiB)"}
        for name in (*moving, "state"):
            panels[name].set(ylabel=labels[name], ylim=(0, None))
        step_axis(state)


# -- the arms of a table -----------------------------------------------------------------------------------------------


def draw(section: Section, directory: Path) -> dict[str, Path]:
    """Draw a section's pictures from its runs, if it has any; return the files by the pictures' names."""
    files = {}
    for name in section.pictures if section.runs else ():
        counts = {"controls": 2, "roles": len(_jobs(section)), "frontier": 1 + (section.kind == "lengths")}
        panels, columns = curves.shape(section) if name == "rates" else (counts.get(name, 1), 1)
        is_low = name == "rates" or panels > 2
        high = 1 + 4 * panels if name == "frontier" else 1 + 1.2 * panels if is_low else 2 + 2 * panels
        files[name] = directory / f"{section.name}-{name}.svg"
        layout = {"sharey": name in ("roles", "rates"), "squeeze": name != "rates", "figsize": (7, high)}
        with _figure(files[name], panels, columns=columns, **layout) as axes:
            DRAWN[name][1](axes, section)
    return files


def _jobs(section: Section) -> list[Job]:
    return [job for job in section.rows.values() if job.runs]


def _mean_curve(job: Job, read: Callable[[dict[str, Any]], Any]) -> tuple[list[int], list[float]]:
    """Return the steps at which all seeds have a number, and its means over seeds; `read` takes a line of metrics."""
    runs = [{line["step"]: read(line) for line in run.metrics()} for run in job.runs.values()]
    steps = [step for step in runs[0] if all(run.get(step) is not None for run in runs)]
    return steps, [statistics.mean(run[step] for run in runs) for step in steps]


def _steps(axes: Any, jobs: Sequence[Job], read: Callable[[dict[str, Any]], Any]) -> None:
    """Draw a step function for each job that has the number."""
    for place, job in enumerate(jobs):
        steps, values = _mean_curve(job, read)
        if steps:
            axes.step(steps, values, color=f"C{place}", where="post", label=job.name)


def _tradeoff(axes: Any, section: Section) -> None:
    """Draw perplexity against state; those far above the best at the upper edge, to keep the others apart."""
    jobs = _jobs(section)
    samples = [Sample.of(job.numbers("validation_perplexity")) for job in jobs]
    best = min(sample.mean for sample in samples)
    near = [sample for sample in samples if sample.mean <= FAR * best]
    lowest, highest = min(s.mean - (s.spread or 0) for s in near), max(s.mean + (s.spread or 0) for s in near)
    margin = 0.15 * (highest - lowest) or 0.01 * best
    for place, (job, sample) in enumerate(zip(jobs, samples, strict=True)):
        sizes = job.numbers("state_bytes")
        start, end = (statistics.mean(size[when] for size in sizes) / MIB for when in ("start", "end"))
        is_near, color = sample.mean <= FAR * best, f"C{place}"
        height = sample.mean if is_near else highest + margin
        name = f"{job.name}, {sample.mean:.1f}{'' if is_near else ' (above)'}"
        axes.plot([start, end], [height, height], color=color, alpha=0.4)
        axes.errorbar(
            [end], [height], yerr=[sample.spread or 0] if is_near else None, fmt=MARKERS[place % len(MARKERS)],
            color=color, capsize=3, clip_on=False, label=name,
        )  # fmt: skip
    axes.set(ylim=(lowest - margin, highest + margin), xlim=(0, None), ylabel="validation perplexity")
    axes.set_xlabel("optimizer state (MiB): a point at the end of the run, a line from its start")
    axes.legend(**LEGEND, loc="center left", bbox_to_anchor=(1, 0.5))


def _controls(axes: Any, section: Section) -> None:
    for panel, key, name in zip(axes, ("density", "interval"), ("density ρ", "interval T (steps)"), strict=True):
        _steps(panel, _jobs(section), lambda line, key=key: line.get(key))
        panel.set(ylabel=name, ylim=(0, None))
    axes[0].legend(**LEGEND)
    step_axis(axes[1])


def _state(axes: Any, section: Section) -> None:
    _steps(axes, _jobs(section), lambda line: line["state_bytes"] / MIB)
    step_axis(axes)
    axes.set(ylabel="optimizer state (MiB)", ylim=(0, None))
    axes.legend(**LEGEND)


def _roles(axes: Any, section: Section) -> None:
    """Draw a panel for each arm: moments of always state-full tensors are constant, the others are the subspace's."""
    jobs = _jobs(section)
    panels = [axes] if len(jobs) == 1 else axes
    for panel, job in zip(panels, jobs, strict=True):
        always = statistics.mean(_always_state_full(run) for run in job.runs.values())
        steps, moments = _mean_curve(job, lambda line: line["state_bytes_by_role"].get("moments", 0))
        _, others = _mean_curve(job, lambda line: line["state_bytes"] - line["state_bytes_by_role"].get("moments", 0))
        stacked = ([always] * len(steps), [size - always for size in moments], others)
        panel.stackplot(steps, *([size / MIB for size in sizes] for sizes in stacked), labels=ROLES)
        panel.set_title(job.name, fontsize=9, loc="left")
    panels[0].legend(**LEGEND, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.2))
    panels[len(jobs) // 2].set_ylabel("optimizer state (MiB)")
    step_axis(panels[-1])


def _always_state_full(run: Record) -> float:
    """Return the bytes of moments of embeddings, norms and head, or of all tensors if an optimizer splits none."""
    summary = run.summary()
    return summary["state_bytes"]["end_by_role"].get("moments", 0) - summary.get("split_moments", {"bytes": 0})["bytes"]


def _memory(axes: Any, section: Section) -> None:
    """Draw what is in use; of a CPU's runs those that are not known to have shared their process with earlier ones."""
    for place, job in enumerate(_jobs(section)):
        memories = {seed: run.summary().get("memory", {}) for seed, run in job.runs.items()}
        kept = [seed for seed, memory in memories.items() if memory.get("alone", True) or "allocated" in memory]
        if kept:
            measured = replace(job, runs={seed: job.runs[seed] for seed in kept})
            steps, sizes = _mean_curve(measured, lambda line: in_use(line.get("memory", {})))
            axes.plot(steps, sizes, color=f"C{place}", label=job.name)
    ylabel = "MiB: a GPU's peak since the last point,\nor what the process holds on a CPU"
    step_axis(axes)
    axes.set(ylabel=ylabel, ylim=(0, None))
    axes.legend(**LEGEND)


def in_use(memory: dict[str, float]) -> float | None:
    """Return a GPU's peak or a process's resident memory in MiB, as a line of metrics has it."""
    found = memory.get("peak", memory.get("resident"))
    return None if found is None else found / MIB


def _time(axes: Any, section: Section) -> None:
    """Draw times as shares of the same run's forward and backward, since seconds of different runs do not compare."""
    jobs = _jobs(section)
    left = [0.0] * len(jobs)
    for place, phase in enumerate(PHASES):
        shares = ([s.get(phase, 0.0) / (s["forward"] + s["backward"]) for s in job.numbers("seconds")] for job in jobs)
        widths = [statistics.mean(share) for share in shares]
        axes.barh(range(len(jobs)), widths, left=left, color=f"C{place}", label=phase)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(jobs)), [job.name for job in jobs])
    axes.invert_yaxis()
    axes.set_xlabel("time ÷ that of the same run's forward and backward")
    axes.legend(**LEGEND, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1))


DRAWN = {  # name -> title, drawing function
    "loss": ("Training loss", losses.training),
    "validation": ("Validation loss", losses.validation),
    "frontier": ("Loss against optimizer state", frontier.draw),
    "tradeoff": ("Perplexity against optimizer state", _tradeoff),
    "rates": ("The loss along each rate of the searches", curves.draw),
    "controls": ("Density and interval over the run", _controls),
    "state": ("Optimizer state over the run", _state),
    "roles": ("What the optimizer state is of", _roles),
    "memory": ("Memory over the run", _memory),
    "time": ("Time by phase", _time),
}
