"""Tables of typed cells, written as Markdown, LaTeX or CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from adafrugal.reports.statistics import Sample

NONE = "–"  # there is no such number; in CSV an empty field
MISSING = "missing"  # not a blank, which would read as zero
DIVERGED = "diverged"  # the loss became NaN or infinite
TWO_SEEDS = "An interval of two seeds has one degree of freedom, and says little: take three or more."
_LATEX = str.maketrans({
    "\\": r"\textbackslash{}", "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "±": r"$\pm$", "−": "$-$", "→": r"$\to$",
    "÷": r"$\div$", "ρ": r"$\rho$", "τ": r"$\tau$", "γ": r"$\gamma$", "≤": r"$\le$", "·": r"$\cdot$", "–": "--",
    "<": "$<$", ">": "$>$", "β": r"$\beta$", "$": r"\$", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
})  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """Numbers of a table: as text, and unrounded for CSV, by the suffix of their column's name."""

    text: str
    values: Mapping[str, float | str | None]
    is_best: bool = False  # written in bold


def number(sample: Sample, form: str, unit: str = "") -> Cell:
    """Return a mean over seeds with its spread; `form` is a format specification."""
    shown = [f"{value:{form}}{unit}" for value in (sample.mean, sample.spread) if value is not None]
    suffix = f" {unit}" if unit else ""
    return Cell(" ± ".join(shown), {suffix: sample.mean, f" spread{suffix}": sample.spread})


def difference(sample: Sample, form: str) -> Cell:
    """Return a paired difference over seeds with its interval; `form` is a format specification."""
    low, high = sample.interval or (None, None)
    interval = "(1 seed)" if low is None else f"[{low:+{form}}, {high:+{form}}]"
    text = f"{sample.mean:+{form}} {interval}".replace("-", "−")
    return Cell(text, {"": sample.mean, " low": low, " high": high, " n": sample.n})


def change(start: float, end: float, unit: str) -> Cell:
    """Return means over seeds at the start and at the end of the runs."""
    text = f"{start:.2f} {unit} → {end:.2f} {unit}"
    return Cell(text, {f" at the start {unit}": start, f" at the end {unit}": end})


@dataclass(frozen=True)
class Grid:
    """A table of named columns; the first holds text."""

    head: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]

    def markdown(self) -> str:
        """Return the table in Markdown, best numbers in bold."""
        body = [[_text(cell, "**{}**") for cell in row] for row in self.rows]
        lines = [self.head, ["---"] + ["---:"] * (len(self.head) - 1), *body]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def notes(self) -> list[str]:
        """Return what ± and intervals are, where the table has them, and how little an interval of two seeds says."""
        found = [cell.values for row in self.rows for cell in row if isinstance(cell, Cell)]
        has_spread = any(value is not None for of in found for name, value in of.items() if name.startswith(" spread"))
        seeds = [of.get(" n") for of in found if of.get(" low") is not None]
        return [
            *(["±: standard deviation over seeds (n − 1)."] if has_spread else []),
            *(["[ ]: 95% interval over seeds, by Student's t."] if seeds else []),
            *([TWO_SEEDS] if 2 in seeds else []),
        ]

    def latex(self, caption: str, label: str) -> str:
        """Return a LaTeX table with rules from booktabs, and a line below it that says what ± and intervals are."""
        body = [[_text(cell, r"\textbf{{{}}}", _LATEX) for cell in row] for row in (self.head, *self.rows)]
        head, *rows = (f"{' & '.join(line)} \\\\" for line in body)
        lines = [r"% needs \usepackage{booktabs}", r"\begin{table}", r"\centering"]
        lines += [rf"\caption{{{caption.translate(_LATEX)}}}", rf"\label{{tab:{label}}}"]
        lines += [rf"\begin{{tabular}}{{l{'r' * (len(self.head) - 1)}}}", r"\toprule", head, r"\midrule", *rows]
        lines += [r"\bottomrule", r"\end{tabular}"]
        if notes := " ".join(self.notes()):
            lines.append(rf"\par\smallskip{{\footnotesize {notes.translate(_LATEX)}}}")
        return "\n".join([*lines, r"\end{table}", ""])

    def csv(self) -> str:
        """Return unrounded CSV; a cell of several numbers has several columns, and words are in the first of them."""
        columns = []  # of each column, the suffixes of all its cells' numbers
        for cells in zip(*self.rows, strict=True):
            columns.append(list(dict.fromkeys(part for c in cells if isinstance(c, Cell) for part in c.values)) or [""])
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([f"{name}{part}" for name, parts in zip(self.head, columns, strict=True) for part in parts])
        for row in self.rows:
            line = []
            for cell, parts in zip(row, columns, strict=True):
                values = cell.values if isinstance(cell, Cell) else {parts[0]: "" if cell == NONE else cell}
                line += [values.get(part) for part in parts]
            writer.writerow(line)
        return file.getvalue()


def _text(cell: str | Cell, bold: str, escaped: Mapping[int, str] | None = None) -> str:
    text = (cell if isinstance(cell, str) else cell.text).translate(escaped or {})
    return bold.format(text) if isinstance(cell, Cell) and cell.is_best else text
