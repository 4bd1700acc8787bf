"""What `make gpu` measured: a table of one machine's stages, and a page of several machines side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from adafrugal.reports import figures
from adafrugal.reports.figures import NONE, Measured, read

ABOUT = """\
Each column is one run of `make gpu`; [docs/gpu.md](../../../docs/gpu.md) says what its stages do. "–" is what was not
measured; where a machine lacks whole rows, a line below says why. "(notes)" is what was written down by hand."""
SPEED = """\
Milliseconds per step, tokens per second, ÷ the bare loop (AdamW, compiled), MFU. A row begins with the model and the
rows × tokens of a step. MFU is 6 × (parameters without the input embedding) × tokens per second ÷ the card's peak in
dense bf16, as its datasheet has it: 989 TFLOP/s for the H100 SXM (NVIDIA H100 datasheet) and the H200 SXM. LLaMA 60M
has 58.07 million parameters; 16.38 million of them are the input embedding."""
COSTS = """\
Seconds of compiling (or of the whole warm-up, where no more was noted), the most that tensors took, the error of the
estimate. The estimate is of a run that is not compiled, so it is an upper bound for one that is."""
MEMORY = """\
What tensors took at most, and the error of the estimate; 16 × 256 tokens in bf16, not compiled, unless the row says
otherwise."""
SEVEN = """\
256 tokens a step, every setting that lowers memory: allocated / reserved by torch / used on the card, the error of the
estimate of the first, seconds per step (of the first step)."""
ARMS = """\
Short real runs of train.py, several at a time on one card: the last training loss, tokens per second, state."""


@dataclass(frozen=True)
class Section:
    """A table of the page.

    Args:
        title: above it.
        about: what its cells say.
        rows: of one machine.
        stage: that measures it; None: it is no stage's.
    """

    title: str
    about: str
    rows: Callable[[Measured], dict[str, str]]
    stage: str | None = None


LOOPS = ("loop", "loop_small")
SECTIONS = (
    Section("Machines", "What each column was measured on.", figures.machine),
    Section("Stages", "How each stage of `make gpu` ended, and after how long.", figures.stages),
    Section("GPU tests", "`pytest -m gpu`: how many passed, failed and were skipped.", figures.tests, "tests"),
    Section("Steps of optimizers", "Milliseconds per step, ÷ torch's fused AdamW.", figures.steps, "steps"),
    Section("Training: speed", SPEED, figures.loops(figures.speed, *LOOPS), "loop"),
    Section("Training: compiling and memory", COSTS, figures.loops(figures.costs, *LOOPS), "loop"),
    Section("Training: phases", "Milliseconds of a step.", figures.loops(figures.phases, *LOOPS), "loop"),
    Section("Memory and its estimate", MEMORY, figures.memory, "memory"),
    Section("LLaMA 7B, all weights trained", SEVEN, figures.seven, "llama_7b"),
    Section("Arms of `c4_60m`", ARMS, figures.arms, "arms"),
)


def find(places: Iterable[Path]) -> list[Measured]:
    """The directories of `make gpu` at or below some others, the oldest first."""
    files = {file for place in places for file in place.rglob("results.json")}
    return sorted((read(file.parent) for file in files), key=lambda one: (one.about["date"], one.name))


def outcomes(one: Measured) -> str:
    """How each stage ended, how long it took, and the figures that matter, in Markdown."""
    lines = ["| stage | outcome | seconds | figures |", "| --- | --- | ---: | --- |"]
    for stage in one.about["stages"]:
        shown = _matter(one, stage["stage"]) or NONE
        said = shown if stage["outcome"] == "passed" else f"{shown} ({figures.cell(stage['last'])})"
        lines.append(f"| {stage['stage']} | {stage['outcome']} | {stage['seconds']:.1f} | {said} |")
    return "\n".join(lines)


def _matter(one: Measured, stage: str) -> str:
    """The figures of a stage that are worth a line."""
    if stage == "tests":
        return ", ".join(f"{count} {name}" for name, count in one.stage(stage)["tests"].items() if count)
    if stage == "arms":
        arms = one.figures.get(stage, {}).get("arms", [])
        bad = [arm["arm"] for arm in arms if arm["exit"] != 0]
        return f"{len(arms) - len(bad)} of {len(arms)} ran to their end" + (f", not {', '.join(bad)}" if bad else "")
    if stage == "memory":
        errors = figures.errors(one)
        return f"estimates from {min(errors):+.1%} to {max(errors):+.1%}" if errors else ""
    if stage == "steps":
        return "; ".join(f"{row['size']} {row['optimizer']} {row['ratio']:.2f} × AdamW" for row in one.rows(stage))
    if stage in LOOPS:
        loops = one.figures.get(stage, {}).get("loops", [])
        return "; ".join(f"{x['loop']} {x['optimizer']} {x['ms']:.1f} ms, {x['ratio']:.2f} × bare" for x in loops)
    return "; ".join(f"{name}: {cell}" for name, cell in figures.seven(one).items())


def markdown(measured: Sequence[Measured]) -> str:
    """All tables, a column for each machine."""
    return "\n\n".join(["# Measured on GPUs", ABOUT, *(_section(section, measured) for section in SECTIONS)]) + "\n"


def _section(section: Section, measured: Sequence[Measured]) -> str:
    columns = [section.rows(one) for one in measured]
    names = list(dict.fromkeys(name for column in columns for name in column))
    if not names:
        return f"## {section.title}\n\nNot measured yet."
    lines = [f"|  | {' | '.join(one.label for one in measured)} |", f"| --- |{' --- |' * len(measured)}"]
    lines += [f"| {name} | {' | '.join(column.get(name, NONE) for column in columns)} |" for name in names]
    missing = [_why(section, one) for one, column in zip(measured, columns, strict=True) if len(column) < len(names)]
    return "\n\n".join([f"## {section.title}", section.about, "\n".join(lines), *missing])


def _why(section: Section, one: Measured) -> str:
    """Why a column lacks rows of its table."""
    outcome = one.stage(section.stage).get("outcome", "passed") if section.stage else "passed"
    reason = "; it was no part of that run" if outcome == "passed" else f", where the stage {section.stage} {outcome}"
    return f"–: not measured at {one.label}{reason}."
