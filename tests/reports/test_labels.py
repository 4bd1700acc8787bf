"""Names beside points: none on another, on a point, or outside."""

import itertools

import matplotlib
import pytest
from matplotlib.text import Text

from adafrugal.reports import labels


@pytest.fixture
def axes():
    """Axes from 0 to 10."""
    from matplotlib import pyplot

    matplotlib.use("Agg")
    _, found = pyplot.subplots(layout="constrained", figsize=(7, 5))
    found.set(xlim=(0, 10), ylim=(0, 10), ylabel="a label that the layout makes room for")
    yield found
    pyplot.close("all")


def written(axes, points):
    """The boxes of the names of points, in pixels, after the figure was drawn."""
    names = [(x, y, f"a long name {place}", "C0") for place, (x, y) in enumerate(points)]
    labels.write(axes, names, [[point] for point in points])
    axes.figure.draw_without_rendering()
    return [Text.get_window_extent(note) for note in axes.texts]


def test_a_name_with_room_is_right_of_its_point_without_a_line(axes):
    (box,) = written(axes, [(5, 5)])
    x, y = axes.transData.transform((5, 5))
    point = axes.figure.dpi / 72
    assert (box.x0 - x, (box.y0 + box.y1) / 2 - y) == pytest.approx((labels.RADII[0] * point, 0), abs=1)
    assert axes.texts[0].arrow_patch is None


def test_names_in_a_crowd_and_at_edges_cover_nothing(axes):
    crowd = [(5 + x / 4, 5 + y / 5) for x, y in itertools.product(range(3), range(4))]
    points = [*crowd, (0, 0), (10, 10), (10, 5)]
    boxes = written(axes, points)
    assert not [(a, b) for a, b in itertools.combinations(boxes, 2) if a.overlaps(b)]
    pixels = axes.transData.transform(points)
    assert not [box for box in boxes if any(box.contains(*at) for at in pixels)]
    for box in boxes:
        assert axes.bbox.padded(1).containsx(box.x0) and axes.bbox.padded(1).containsx(box.x1)
        assert axes.bbox.padded(1).containsy(box.y0) and axes.bbox.padded(1).containsy(box.y1)
    assert any(note.arrow_patch for note in axes.texts), "some are farther off, with a line to their point"
