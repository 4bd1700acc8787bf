"""The figures of a directory that `make gpu` wrote: rows of tables, as name -> cell."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adafrugal.tracking import cards

NONE = "–"
STAGES = ("tests", "arms", "memory", "steps", "loop", "loop_small", "llama_7b")
ABOUT = {
    "card": "card", "driver": "driver", "torch": "torch", "cuda": "CUDA", "python": "Python",
    "transformers": "transformers", "processor": "processor", "cores": "cores", "date": "date",
}  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """A directory that `make gpu` wrote.

    Args:
        name: of the directory.
        about: its results.json: machine, code, how the stages ended.
        figures: stage -> what its JSON file says; a stage that wrote none is not in it.
    """

    name: str
    about: Mapping[str, Any]
    figures: Mapping[str, Mapping[str, Any]]

    @property
    def label(self) -> str:
        """The head of its column."""
        about = self.about
        commit = about["commit"][:7] + (" and changes" if about.get("changed") else "")
        return f"{commit}, torch {about['torch']}, {about.get('card') or about['device']}, {about['date'][:10]}"

    def stage(self, name: str) -> Mapping[str, Any]:
        """How a stage ended; nothing where it was not run."""
        return next((stage for stage in self.about["stages"] if stage["stage"] == name), {})

    def rows(self, name: str) -> list[Mapping[str, Any]]:
        """The rows that a stage measured."""
        return self.figures.get(name, {}).get("rows", [])

    def foretold(self, name: str) -> int | None:
        """The estimate of a case of memory, bytes."""
        return self.figures.get("memory", {}).get("foretold", {}).get(name, {}).get("peak")


def read(directory: Path) -> Measured:
    """What one directory has."""
    files = {stage: directory / f"{stage}.json" for stage in STAGES}
    found = {stage: json.loads(file.read_text()) for stage, file in files.items() if file.exists()}
    return Measured(directory.name, json.loads((directory / "results.json").read_text()), found)


def machine(one: Measured) -> dict[str, str]:
    """Card, versions and date."""
    return {shown: str(one.about[name]) for name, shown in ABOUT.items() if one.about.get(name)}


def stages(one: Measured) -> dict[str, str]:
    """How the stages ended."""
    return {
        stage["stage"]: f"{stage['outcome']}, {_number(stage.get('seconds'), '.0f', ' s')}{_noted(stage)}"
        for stage in one.about["stages"]
    }


def tests(one: Measured) -> dict[str, str]:
    """How many GPU tests passed, failed and were skipped, and which failed."""
    stage = one.stage("tests")
    counts = {name: f"{count}{_noted(stage)}" for name, count in stage.get("tests", {}).items()}
    return counts | ({"which failed": ", ".join(stage["failed"])} if stage.get("failed") else {})


def steps(one: Measured) -> dict[str, str]:
    """Steps of optimizers."""
    return {f"{r['size']} {r['optimizer']}": f"{r['step']:.2f} ms, {r['ratio']:.2f}" for r in one.rows("steps")}


def memory(one: Measured) -> dict[str, str]:
    """What tensors took at most, and the error of the estimate."""
    return {row["name"]: row.get("refused") or _taken(row, one.foretold(row["name"])) for row in one.rows("memory")}


def _taken(row: Mapping[str, Any], estimate: int | None) -> str:
    return f"{gib(row['allocated'])}, {_error(estimate, row['allocated'])}"


def errors(one: Measured) -> list[float]:
    """The relative errors of the estimates of memory."""
    rows = [(one.foretold(row["name"]), row["allocated"]) for row in one.rows("memory") if "allocated" in row]
    return [estimate / allocated - 1 for estimate, allocated in rows if estimate]


def seven(one: Measured) -> dict[str, str]:
    """LLaMA 7B with every setting that lowers memory."""
    return {row["name"]: row.get("refused") or _seven(row, one.foretold(row["name"])) for row in one.rows("llama_7b")}


def _seven(row: Mapping[str, Any], estimate: int | None) -> str:
    sizes = " / ".join(gib(row[key]) if key in row else NONE for key in ("allocated", "reserved", "used"))
    seconds = statistics.median(row["ms"][1:] or row["ms"]) / 1000
    return f"{sizes}, {_error(estimate, row['allocated'])}, {seconds:.2f} s ({row['ms'][0] / 1000:.1f} s)"


def arms(one: Measured) -> dict[str, str]:
    """Short real runs."""
    whole = one.figures.get("arms", {})
    return {arm["arm"]: _arm(arm) + _noted(whole) for arm in whole.get("arms", [])}


def _arm(arm: Mapping[str, Any]) -> str:
    if arm["exit"] != 0:
        return f"failed: {cell(arm['last'])}"
    return f"loss {arm['loss']:.3f}, {arm['tokens_per_s']:,.0f} tokens/s, state {gib(arm['state_bytes'])}"


# -- training ---------------------------------------------------------------------------------------------------------

Loop = Mapping[str, Any]


def loops(said: Callable[[Measured, Loop, Loop], str | None], *names: str) -> Callable[[Measured], dict[str, str]]:
    """Rows of the loops that some stages timed; where a loop was timed twice, both are in its cell."""

    def rows(one: Measured) -> dict[str, str]:
        found: dict[str, list[str]] = {}
        for stage in (one.figures[name] for name in names if name in one.figures):
            shape = f"{stage['model'].removeprefix('llama_')}, {stage['batch']} × {stage['length']}"
            for loop in stage["loops"]:
                if text := said(one, stage, loop):
                    found.setdefault(f"{shape}: {_name(loop)}", []).append(text)
        return {name: " · ".join(texts) for name, texts in found.items()}

    return rows


def _name(loop: Loop) -> str:
    if loop.get("as_it_comes"):
        return f"train.py as it comes, {loop['optimizer']}"
    parts = [loop["loop"], loop["optimizer"], "compiled" if loop["mode"] else "not compiled"]
    if loop["loop"] != "bare" and "loss_chunk_rows" in loop:
        chunk = loop["loss_chunk_rows"]
        parts.append("loss in one piece" if chunk is None else f"loss_chunk_rows {chunk}")
    return ", ".join(parts)


def speed(one: Measured, stage: Loop, loop: Loop) -> str:
    """How fast a loop trains."""
    used = mfu(one.about.get("card"), stage, loop["tokens_per_s"])
    share = NONE if used is None else f"{used:.1%}"
    return f"{loop['ms']:.1f} ms, {loop['tokens_per_s']:,.0f}, {_number(loop.get('ratio'), '.2f')}, {share}"


def mfu(card: str | None, stage: Loop, tokens_per_s: float) -> float | None:
    """The share of the card's peak that training uses; None where the card's peak is not known here."""
    flops = 6 * (stage["parameters"] - stage["input_embedding"]) * tokens_per_s
    peak = cards.peak_flops(card or "")
    return flops / peak if peak else None


def costs(one: Measured, stage: Loop, loop: Loop) -> str | None:
    """What a loop costs beside its steps."""
    if loop.get("peak") is None:
        return None
    seconds, error = _number(loop.get("compile_seconds"), ".0f", " s"), _error(loop.get("estimate"), loop["peak"])
    return f"{seconds}, {gib(loop['peak'])}, {error}"


def phases(one: Measured, stage: Loop, loop: Loop) -> str | None:
    """The phases of a loop's step."""
    found = loop.get("phases_ms")
    return found and ", ".join(f"{name} {ms:.1f}" for name, ms in found.items() if ms >= 0.05)


# -- cells ------------------------------------------------------------------------------------------------------------


def gib(size: int) -> str:
    """Bytes."""
    return f"{size / 2**30:.2f} GiB"


def _error(estimate: int | None, measured: int) -> str:
    return NONE if estimate is None else f"{estimate / measured - 1:+.1%}"


def cell(text: str) -> str:
    """A line as it may stand in a table."""
    return text.replace("|", "/")[:120]


def _number(value: float | None, form: str, unit: str = "") -> str:
    return NONE if value is None else f"{value:{form}}{unit}"


def _noted(found: Mapping[str, Any]) -> str:
    return " (notes)" if found.get("source") == "notes" else ""
