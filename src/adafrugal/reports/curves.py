"""Draw the searches of a section: for each arm the loss along each rate, through its best point."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from adafrugal.reports.descent import AXES

if TYPE_CHECKING:
    from adafrugal.reports.plan import Section
    from adafrugal.reports.searches import Search

HIGHEST = 0.15  # nats above an arm's best
COLUMNS = 4


def shape(section: Section) -> tuple[int, int]:
    """Return the rows and columns of panels, one for each search that has ended."""
    count = max(1, len(_ended(section)))
    columns = min(COLUMNS, count)
    return math.ceil(count / columns), columns


def draw(axes: Any, section: Section) -> None:
    """Draw a panel for each arm: along each rate, the trials that differ from the best in it alone."""
    columns, panels, ended = axes.shape[1], axes.ravel(), _ended(section)
    for place, panel in enumerate(panels):
        if place >= len(ended):
            panel.set_axis_off()
            continue
        _draw(panel, ended[place])
        panel.tick_params(labelbottom=place + columns >= len(ended))  # the lowest of its column
    panels[0].set_xscale("log", base=2)
    panels[0].set(ylim=(-0.01, HIGHEST))
    lines = {line.get_label(): line for panel in panels for line in panel.get_lines()}
    shown = [lines[name] for name in AXES if name in lines]
    figure = axes[0, 0].figure
    figure.legend(handles=shown, frameon=False, fontsize=8, ncols=3, loc="outside upper center")
    figure.supxlabel("rate ÷ the arm's best (one side without a point: the best is at an edge)", fontsize=9)
    figure.supylabel("loss of the trial − loss of the best", fontsize=9)


def _ended(section: Section) -> list[Search]:
    return [each for each in section.searches if not each.pending]


def _draw(panel: Any, each: Search) -> None:
    found = each.found
    for axis, name in found.axes.items():
        line = [point for point in found.line(axis) if math.isfinite(found.tried[point])]
        factors = [2 ** ((point[axis] - found.best[axis]) / 2) for point in line]
        above = [found.tried[point] - found.tried[found.best] for point in line]
        panel.plot(factors, above, f"{'os^'[axis]}-", color=f"C{axis}", markersize=3, linewidth=1, label=name)
    panel.set_title(each.arm.name, fontsize=8, loc="left")
    panel.axvline(1, color="grey", linestyle=":", linewidth=0.8)
    panel.tick_params(labelsize=7)
