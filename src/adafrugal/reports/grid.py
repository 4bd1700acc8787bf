"""Tables of typed cells, written as Markdown, LaTeX or CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from adafrugal.reports.statistics import Contrast, Sample

MISSING = "missing"  # not a blank, which would read as zero
_LATEX = str.maketrans({
    "\\": r"\textbackslash{}", "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "±": r"$\pm$", "−": "$-$", "→": r"$\to$",
    "÷": r"$\div$", "ρ": r"$\rho$", "τ": r"$\tau$", "γ": r"$\gamma$", "≤": r"$\le$", "·": r"$\cdot$", "–": "--",
})  # fmt: skip


@dataclass(frozen=True)
class Number:
    """A mean over seeds with its spread; `form` is a format specification."""

    sample: Sample
    form: str
    unit: str = ""
    is_best: bool = False  # written in bold

    def __str__(self) -> str:
        mean = f"{self.sample.mean:{self.form}}{self.unit}"
        return mean if self.sample.spread is None else f"{mean} ± {self.sample.spread:{self.form}}{self.unit}"

    def values(self) -> dict[str, float | None]:
        """Return the unrounded numbers for CSV, by the suffix of their column's name."""
        unit = f" {self.unit}" if self.unit else ""
        return {unit: self.sample.mean, f" spread{unit}": self.sample.spread}


@dataclass(frozen=True)
class Difference:
    """A paired difference over seeds with its interval; `form` is a format specification."""

    contrast: Contrast
    form: str

    def __str__(self) -> str:
        mean, low, high = (
            "" if value is None else f"{value:+{self.form}}"
            for value in (self.contrast.mean, self.contrast.low, self.contrast.high)
        )
        return (f"{mean} [{low}, {high}]" if low else f"{mean} (1 seed)").replace("-", "−")

    def values(self) -> dict[str, float | None]:
        """Return the unrounded numbers for CSV, by the suffix of their column's name."""
        c = self.contrast
        return {"": c.mean, " low": c.low, " high": c.high, " n": c.n}


@dataclass(frozen=True)
class Change:
    """Means over seeds at the start and at the end of the runs."""

    start: float
    end: float
    unit: str

    def __str__(self) -> str:
        return f"{self.start:.2f} {self.unit} → {self.end:.2f} {self.unit}"

    def values(self) -> dict[str, float | None]:
        """Return the unrounded numbers for CSV, by the suffix of their column's name."""
        return {f" at the start {self.unit}": self.start, f" at the end {self.unit}": self.end}


Cell = str | Number | Difference | Change


@dataclass(frozen=True)
class Grid:
    """A table of named columns; the first holds text."""

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def markdown(self) -> str:
        """Return the table in Markdown, best numbers in bold."""
        body = [[f"**{cell}**" if _is_best(cell) else str(cell) for cell in row] for row in self.rows]
        lines = [self.head, ["---"] + ["---:"] * (len(self.head) - 1), *body]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def latex(self, caption: str) -> str:
        """Return a LaTeX table with rules from booktabs."""
        body = [[_latex(cell) for cell in row] for row in (self.head, *self.rows)]
        head, *rows = (f"{' & '.join(line)} \\\\" for line in body)
        lines = [r"\begin{table}", r"\centering", rf"\caption{{{_latex(caption)}}}"]
        lines += [rf"\begin{{tabular}}{{l{'r' * (len(self.head) - 1)}}}", r"\toprule", head, r"\midrule", *rows]
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])

    def csv(self) -> str:
        """Return unrounded CSV; a cell of several numbers has several columns, and text is in the first of them."""
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
            writer.writerow([f.get(part) for f, parts in zip(found, columns, strict=True) for part in parts])
        return file.getvalue()


def _is_best(cell: Cell) -> bool:
    return isinstance(cell, Number) and cell.is_best


def _latex(cell: Cell) -> str:
    text = str(cell).translate(_LATEX)
    return rf"\textbf{{{text}}}" if _is_best(cell) else text
