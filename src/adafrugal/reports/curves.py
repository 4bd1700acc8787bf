"""Draw the searches of a section: the loss along each rate, through the best point of each arm."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from adafrugal.reports.descent import AXES
from adafrugal.reports.frontier import MARKERS

if TYPE_CHECKING:
    from adafrugal.reports.plan import Section

HIGHEST = 0.2  # nats above an arm's best


def draw(axes: Any, section: Section) -> None:
    """Draw a panel for each rate: of the searches that have ended, trials that differ from the best in it alone."""
    for axis, (panel, name) in enumerate(zip(axes, AXES, strict=True)):
        for place, each in enumerate(each for each in section.searches if not each.pending):
            found = each.found
            if axis not in found.axes:
                continue
            line = [point for point in found.line(axis) if math.isfinite(found.tried[point])]
            factors = [2 ** ((point[axis] - found.best[axis]) / 2) for point in line]
            above = [found.tried[point] - found.tried[found.best] for point in line]
            marker = MARKERS[place % len(MARKERS)]
            style = {"color": f"C{place % 10}", "markersize": 4, "linewidth": 1}
            panel.plot(factors, above, f"{marker}-", label=each.arm.name, **style)
        panel.set(ylabel=f"{name}:\nloss − best", ylim=(-0.005, HIGHEST))
        panel.axvline(1, color="grey", linestyle=":", linewidth=0.8)
    axes[-1].set_xscale("log", base=2)
    axes[-1].set_xlabel("rate ÷ the arm's best (one side without a point: the best is at an edge)")
    axes[0].legend(frameon=False, fontsize=7, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.02))
