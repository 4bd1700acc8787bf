"""The measurements of `make gpu`: a table of one machine's stages, and a page of several machines side by side."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adafrugal.reports.grid import NONE
from adafrugal.tracking import cards

TOKENS = 512 * 256  # of a step in the papers' pre-training
LOOPS = ("loop", "loop_small")
STAGES = ("tests", "arms", "memory", "steps", *LOOPS, "llama_7b")
MACHINE = ("card", "driver", "torch", "cuda", "python", "transformers", "processor", "cores", "date")
SHOWN = {"cuda": "CUDA", "python": "Python"}
Entry = Mapping[str, Any]
Cells = dict[str, str]  # row -> cell


@dataclass(frozen=True)
class Measured:
    """A directory that `make gpu` wrote: its results.json, and the JSON file of each stage that wrote one."""

    name: str
    about: Entry  # machine, code, outcomes of the stages
    figures: Mapping[str, Entry]

    @property
    def label(self) -> str:
        """The head of its column: commit, torch, card and date."""
        about = self.about
        commit = about["commit"][:7] + (" and changes" if about.get("changed") else "")
        return f"{commit}, torch {about['torch']}, {about.get('card') or about['device']}, {about['date'][:10]}"

    def stage(self, name: str | None) -> Entry:
        """Return the outcome of a stage; empty if it was not run."""
        return next((stage for stage in self.about["stages"] if stage["stage"] == name), {})

    def rows(self, name: str) -> list[Entry]:
        """Return the rows that a stage measured."""
        return self.figures.get(name, {}).get("rows", [])

    def errors(self, stage: str) -> dict[str, float]:
        """Return the relative error of the memory estimate for each row with an estimate and a measurement."""
        estimates = self.figures.get("memory", {}).get("foretold", {})
        measured = {row["name"]: row["allocated"] for row in self.rows(stage) if "allocated" in row}
        return {name: estimates[name]["peak"] / size - 1 for name, size in measured.items() if name in estimates}


def read(directory: Path) -> Measured:
    """Read a directory that `make gpu` wrote."""
    files = {stage: directory / f"{stage}.json" for stage in STAGES}
    found = {stage: json.loads(file.read_text()) for stage, file in files.items() if file.exists()}
    return Measured(directory.name, json.loads((directory / "results.json").read_text()), found)


def find(places: Iterable[Path]) -> list[Measured]:
    """Return the measurements at or below some directories, the oldest first."""
    files = {file for place in places for file in place.rglob("results.json")}
    return sorted((read(file.parent) for file in files), key=lambda one: (one.about["date"], one.name))


# -- rows of the tables ------------------------------------------------------------------------------------------------


def _machine(one: Measured) -> Cells:
    return {SHOWN.get(name, name): str(one.about[name]) for name in MACHINE if one.about.get(name)}


def _stages(one: Measured) -> Cells:
    return {
        stage["stage"]: f"{stage['outcome']}, {_number(stage.get('seconds'), '.0f', ' s')}{_noted(stage)}"
        for stage in one.about["stages"]
    }


def _tests(one: Measured) -> Cells:
    stage = one.stage("tests")
    counts = {name: f"{count}{_noted(stage)}" for name, count in stage.get("tests", {}).items()}
    return counts | ({"which failed": ", ".join(stage["failed"])} if stage.get("failed") else {})


def _steps(one: Measured) -> Cells:
    passes, found = one.figures.get("steps", {}).get("passes", {}), {}
    for row in one.rows("steps"):
        found[f"{row['size']} {row['optimizer']}"] = f"{row['step']:.2f} ms, {row['ratio']:.2f}"
        if of := passes.get(row["size"]):
            share = row["step"] / (of["ms"] * TOKENS / of["tokens"])
            found[f"{row['size']} {row['optimizer']}"] += f", {share:.1%}"
    return found


def _memory(one: Measured, stage: str = "memory", sizes: Sequence[str] = ("allocated",)) -> Cells:
    errors, found = one.errors(stage), {}
    for row in one.rows(stage):
        measured = " / ".join(_number(row.get(size), ".2f", " GiB", 2**30) for size in sizes)
        found[row["name"]] = row.get("refused") or f"{measured}, {_number(errors.get(row['name']), '+.1%')}"
    return found


def _llama_7b(one: Measured) -> Cells:
    found = _memory(one, "llama_7b", ("allocated", "reserved", "used"))
    for row in one.rows("llama_7b"):
        if not row.get("refused"):
            first, *others = (ms / 1000 for ms in row["ms"])
            found[row["name"]] += f", {statistics.median(others or [first]):.2f} s ({first:.1f} s)"
    return found


def _arms(one: Measured) -> Cells:
    stage, found = one.figures.get("arms", {}), {}
    for arm in stage.get("arms", []):
        text = f"failed: {_cell(arm['last'])}"
        if arm["exit"] == 0:
            size = _number(arm["state_bytes"], ".2f", " GiB", 2**30)
            text = f"loss {arm['loss']:.3f}, {arm['tokens_per_s']:,.0f} tokens/s, state {size}"
        found[arm["arm"]] = text + _noted(stage)
    return found


def _loops(cell: Callable[[Measured, Entry, Entry], str | None]) -> Callable[[Measured], Cells]:
    """Return a function to rows of the timed training loops; a loop timed twice has both values in its cell."""

    def rows(one: Measured) -> Cells:
        found: dict[str, list[str]] = {}
        for stage in (one.figures[name] for name in LOOPS if name in one.figures):
            shape = f"{stage['model'].removeprefix('llama_')}, {stage['batch']} × {stage['length']}"
            for loop in stage["loops"]:
                if text := cell(one, stage, loop):
                    found.setdefault(f"{shape}: {_loop_name(loop)}", []).append(text)
        return {name: " · ".join(texts) for name, texts in found.items()}

    return rows


def _loop_name(loop: Entry) -> str:
    if loop.get("as_it_comes"):
        return f"train.py as it comes, {loop['optimizer']}"
    parts = [loop["loop"], loop["optimizer"], "compiled" if loop["mode"] else "not compiled"]
    if loop["loop"] != "bare" and "loss_chunk_rows" in loop:
        chunk = loop["loss_chunk_rows"]
        parts.append("loss in one piece" if chunk is None else f"loss_chunk_rows {chunk}")
    return ", ".join(parts)


def _speed(one: Measured, stage: Entry, loop: Entry) -> str:
    used = _number(mfu(one.about.get("card"), stage, loop["tokens_per_s"]), ".1%")
    return f"{loop['ms']:.1f} ms, {loop['tokens_per_s']:,.0f}, {_number(loop.get('ratio'), '.2f')}, {used}"


def mfu(card: str | None, stage: Entry, tokens_per_s: float) -> float | None:
    """Return the model FLOPs utilization, a share of the card's peak; None if that peak is unknown."""
    flops = 6 * (stage["parameters"] - stage["input_embedding"]) * tokens_per_s
    peak = cards.peak_flops(card or "")
    return flops / peak if peak else None


def _costs(one: Measured, stage: Entry, loop: Entry) -> str | None:
    if (peak := loop.get("peak")) is None:
        return None
    error = loop["estimate"] / peak - 1 if loop.get("estimate") is not None else None
    parts = (loop.get("compile_seconds"), ".0f", " s"), (peak, ".2f", " GiB", 2**30), (error, "+.1%")
    return ", ".join(_number(*part) for part in parts)


def _phases(one: Measured, stage: Entry, loop: Entry) -> str | None:
    found = loop.get("phases_ms")
    return found and ", ".join(f"{name} {ms:.1f}" for name, ms in found.items() if ms >= 0.05)


def _cell(text: str) -> str:
    return text.replace("|", "/")[:120]


def _number(value: float | None, form: str, unit: str = "", per: float = 1) -> str:
    return NONE if value is None else f"{value / per:{form}}{unit}"


def _noted(found: Entry) -> str:
    return " (notes)" if found.get("source") == "notes" else ""


# -- the page, and the table of one machine ----------------------------------------------------------------------------

ABOUT = """\
Each column is one run of `make gpu`; [docs/gpu.md](../../../docs/gpu.md) says what its stages do. "–" is what was not
measured; where a machine lacks whole rows, a line below says why. "(notes)" is what was written down by hand."""
STEPS = f"""\
Milliseconds per step, ÷ torch's fused AdamW; at 350M also ÷ forward and backward of {TOKENS:,} tokens, as timed with
32,768 in bf16, compiled."""
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
TABLES: tuple[tuple[str, str, Callable[[Measured], Cells], str | None], ...] = (  # title, cells, rows, stage
    ("Machines", "What each column was measured on.", _machine, None),
    ("Stages", "How each stage of `make gpu` ended, and after how long.", _stages, None),
    ("GPU tests", "`pytest -m gpu`: how many passed, failed and were skipped.", _tests, "tests"),
    ("Steps of optimizers", STEPS, _steps, "steps"),
    ("Training: speed", SPEED, _loops(_speed), "loop"),
    ("Training: compiling and memory", COSTS, _loops(_costs), "loop"),
    ("Training: phases", "Milliseconds of a step.", _loops(_phases), "loop"),
    ("Memory and its estimate", MEMORY, _memory, "memory"),
    ("LLaMA 7B, all weights trained", SEVEN, _llama_7b, "llama_7b"),
    ("Arms of `c4_60m`", ARMS, _arms, "arms"),
)


def markdown(measured: Sequence[Measured]) -> str:
    """Return the page: all tables, a column for each machine."""
    parts = ["# Measured on GPUs", ABOUT]
    for title, about, rows, stage in TABLES:
        columns = [rows(one) for one in measured]
        names = list(dict.fromkeys(name for column in columns for name in column))
        lines = [f"|  | {' | '.join(one.label for one in measured)} |", f"| --- |{' --- |' * len(measured)}"]
        lines += [f"| {name} | {' | '.join(column.get(name, NONE) for column in columns)} |" for name in names]
        parts += [f"## {title}", *([about, "\n".join(lines)] if names else ["Not measured yet."])]
        parts += [_why(stage, one) for one, column in zip(measured, columns, strict=True) if len(column) < len(names)]
    return "\n\n".join(parts) + "\n"


def _why(stage: str | None, one: Measured) -> str:
    """Return the reason why a column lacks rows of its table."""
    outcome = one.stage(stage).get("outcome", "passed")
    reason = "; it was no part of that run" if outcome == "passed" else f", where the stage {stage} {outcome}"
    return f"–: not measured at {one.label}{reason}."


def outcomes(one: Measured) -> str:
    """Return each stage's outcome, seconds and main figures, in Markdown."""
    lines = ["| stage | outcome | seconds | figures |", "| --- | --- | ---: | --- |"]
    for stage in one.about["stages"]:
        shown = _main_figures(one, stage["stage"]) or NONE
        said = shown if stage["outcome"] == "passed" else f"{shown} ({_cell(stage['last'])})"
        lines.append(f"| {stage['stage']} | {stage['outcome']} | {stage['seconds']:.1f} | {said} |")
    return "\n".join(lines)


def _main_figures(one: Measured, stage: str) -> str:
    if stage == "tests":
        return ", ".join(f"{count} {name}" for name, count in one.stage(stage)["tests"].items() if count)
    if stage == "arms":
        arms = one.figures.get(stage, {}).get("arms", [])
        bad = [arm["arm"] for arm in arms if arm["exit"] != 0]
        return f"{len(arms) - len(bad)} of {len(arms)} ran to their end" + (f", not {', '.join(bad)}" if bad else "")
    if stage == "memory":
        errors = one.errors(stage).values()
        return f"estimates from {min(errors):+.1%} to {max(errors):+.1%}" if errors else ""
    if stage == "steps":
        return "; ".join(f"{row['size']} {row['optimizer']} {row['ratio']:.2f} × AdamW" for row in one.rows(stage))
    if stage in LOOPS:
        loops = one.figures.get(stage, {}).get("loops", [])
        return "; ".join(f"{x['loop']} {x['optimizer']} {x['ms']:.1f} ms, {x['ratio']:.2f} × bare" for x in loops)
    return "; ".join(f"{name}: {cell}" for name, cell in _llama_7b(one).items())
