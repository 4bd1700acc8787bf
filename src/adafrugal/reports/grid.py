"""A table as Markdown, as LaTeX and as CSV: the same cells, three ways to write them."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from adafrugal.reports.statistics import Contrast, Sample

MISSING = "missing"  # never a blank, which reads like nothing, or like zero
_LATEX = {
    "\\": r"\textbackslash{}", "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "±": r"$\pm$", "−": "$-$", "→": r"$\to$",
    "÷": r"$\div$", "ρ": r"$\rho$", "τ": r"$\tau$", "γ": r"$\gamma$", "≤": r"$\le$", "·": r"$\cdot$", "–": "--",
}  # fmt: skip


@dataclass(frozen=True)
class Number:
    """A mean with its spread.

    Args:
        sample: over seeds.
        form: how a number is written, as `format` takes it.
        unit: behind it.
        is_best: whether it stands out.
    """

    sample: Sample
    form: str
    unit: str = ""
    is_best: bool = False

    def __str__(self) -> str:
        mean = f"{self.sample.mean:{self.form}}{self.unit}"
        return mean if self.sample.spread is None else f"{mean} ± {self.sample.spread:{self.form}}{self.unit}"

    def values(self) -> dict[str, str]:
        """For CSV: the numbers whole, by what is added to the column's name."""
        unit = f" {self.unit}" if self.unit else ""
        return {unit: repr(self.sample.mean), f" spread{unit}": _whole(self.sample.spread)}


@dataclass(frozen=True)
class Difference:
    """A paired difference with its interval.

    Args:
        contrast: over seeds.
        form: how a number is written, as `format` takes it.
    """

    contrast: Contrast
    form: str

    def __str__(self) -> str:
        c = self.contrast
        mean = f"{c.mean:+{self.form}}"
        whole = f"{mean} (1 seed)" if c.low is None else f"{mean} [{c.low:+{self.form}}, {c.high:+{self.form}}]"
        return whole.replace("-", "−")

    def values(self) -> dict[str, str]:
        """For CSV: the numbers whole, by what is added to the column's name."""
        c = self.contrast
        return {"": repr(c.mean), " low": _whole(c.low), " high": _whole(c.high), " n": str(c.n)}


@dataclass(frozen=True)
class Change:
    """A number at the start of a run and at its end.

    Args:
        start: mean over seeds.
        end: likewise.
        unit: behind both.
    """

    start: float
    end: float
    unit: str

    def __str__(self) -> str:
        return f"{self.start:.2f} {self.unit} → {self.end:.2f} {self.unit}"

    def values(self) -> dict[str, str]:
        """For CSV: the numbers whole, by what is added to the column's name."""
        return {f" at the start {self.unit}": repr(self.start), f" at the end {self.unit}": repr(self.end)}


Cell = str | Number | Difference | Change


@dataclass(frozen=True)
class Grid:
    """A table whose first column is words.

    Args:
        head: the columns' names.
        rows: of cells.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def markdown(self) -> str:
        """As Markdown has it."""
        lines = [self.head, ["---"] + ["---:"] * (len(self.head) - 1), *self.rows]
        return "\n".join(f"| {' | '.join(_bold(cell, '**') for cell in line)} |" for line in lines)

    def latex(self, caption: str) -> str:
        """A table with booktabs' rules, to be put into a paper."""
        lines = [r"\begin{table}", r"\centering", rf"\caption{{{_escaped(caption)}}}"]
        lines += [rf"\begin{{tabular}}{{l{'r' * (len(self.head) - 1)}}}", r"\toprule"]
        lines += [_latex_row(self.head), r"\midrule", *(_latex_row(row) for row in self.rows), r"\bottomrule"]
        return "\n".join([*lines, r"\end{tabular}", r"\end{table}", ""])

    def csv(self) -> str:
        """Every number whole; a cell of several numbers takes several columns, and words stand in the first of them."""
        columns = [
            list(dict.fromkeys(part for cell in cells if not isinstance(cell, str) for part in cell.values())) or [""]
            for cells in zip(*self.rows, strict=True)
        ]
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([f"{name}{part}" for name, parts in zip(self.head, columns, strict=True) for part in parts])
        for row in self.rows:
            found = [
                {parts[0]: cell} if isinstance(cell, str) else cell.values()
                for cell, parts in zip(row, columns, strict=True)
            ]
            writer.writerow([f.get(part, "") for f, parts in zip(found, columns, strict=True) for part in parts])
        return file.getvalue()


def _bold(cell: Cell, mark: str) -> str:
    return f"{mark}{cell}{mark}" if isinstance(cell, Number) and cell.is_best else str(cell)


def _latex_row(row: Sequence[Cell]) -> str:
    cells = (_escaped(str(cell)) for cell in row)
    bold = (isinstance(cell, Number) and cell.is_best for cell in row)
    return " & ".join(rf"\textbf{{{cell}}}" if b else cell for cell, b in zip(cells, bold, strict=True)) + r" \\"


def _whole(number: float | None) -> str:
    return "" if number is None else repr(number)


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)
