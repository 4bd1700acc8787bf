"""Write names beside the points of a picture, without one on top of another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

FONT = 8  # points
RADII = (7, 13, 21, 31, 43, 57, 73, 91)  # points from a marker to its name
ANGLES = (0, 180, 90, 270, 45, 315, 135, 225)  # degrees, in the order of preference


def write(axes: Any, names: Sequence[tuple[float, float, str, str]], drawn: Sequence[Any]) -> None:
    """Write each (x, y, text, color) near its point, where it covers least, with a line to a point that is farther off.

    Args:
        axes: with its limits set.
        names: in the order in which they choose their places.
        drawn: what to keep free, such as a marker with its error bar, each as the points (x, y) of its corners.
    """
    from matplotlib.transforms import Bbox

    axes.figure.draw_without_rendering()  # lays the figure out: pixels are where they will be
    point = axes.figure.dpi / 72
    taken = [Bbox([pixels.min(axis=0), pixels.max(axis=0)]).padded(4 * point) for pixels in
             (axes.transData.transform(corners) for corners in drawn)]  # fmt: skip
    for x, y, text, color in names:
        measured = axes.text(x, y, text, fontsize=FONT)
        size = measured.get_window_extent()
        measured.remove()
        at = axes.transData.transform((x, y))
        found = []
        for radius, left, bottom in _places(size.width / point, size.height / point):
            box = Bbox.from_bounds(at[0] + left * point, at[1] + bottom * point, size.width, size.height)
            outside = _area(box) - _area(Bbox.intersection(box, axes.bbox))
            covered = outside + sum(_area(Bbox.intersection(box, other)) for other in taken)
            found.append((radius + covered / point**2, radius, (left, bottom), box))
        _, radius, place, box = min(found, key=lambda each: each[0])
        taken.append(box)
        line = {"arrowstyle": "-", "color": color, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3}
        note = axes.annotate(
            text, (x, y), place, textcoords="offset points", fontsize=FONT, color=color, va="bottom",
            arrowprops=line if radius > RADII[0] else None,
        )  # fmt: skip
        note.set_in_layout(False)


def _places(width: float, height: float) -> Iterator[tuple[float, float, float]]:
    """Yield radius, and the left and bottom of a name of that size from its point, from the best place on."""
    for radius in RADII:
        for angle in ANGLES:
            right, up = (round(f(math.radians(angle)), 9) for f in (math.cos, math.sin))
            sides = ((right > 0) - (right < 0) - 1) / 2, ((up > 0) - (up < 0) - 1) / 2  # of its size: 0, −1/2 or −1
            yield radius, radius * right + sides[0] * width, radius * up + sides[1] * height


def _area(box: Any) -> float:
    return float(box.width * box.height) if box else 0.0
