"""What the pictures show, read from matplotlib's own objects."""

import matplotlib
import pytest
from made import recorded

from adafrugal.reports import pictures, plan, records
from adafrugal.reports.arms import jobs


@pytest.fixture
def axes(tmp_path):
    """A function: picture -> its axes, drawn from AdamW with two seeds and AdaFRUGAL with one."""
    from matplotlib import pyplot

    matplotlib.use("Agg")
    base = "scale=mini data=embedded"
    for seed in (0, 1):
        recorded(tmp_path, f"experiments=c4_60m/adamw {base}", 4.5 + seed / 5, seed, state=(4, 4), share=0.2)
    recorded(tmp_path, f"experiments=c4_60m/adafrugal {base}", 4.0, 0, state=(3, 1), share=0.1)
    made = tuple(jobs([f"-m experiments=c4_60m/adamw,c4_60m/adafrugal seed=0,1 {base}"]))
    section = plan.Section("main", "Main", [], jobs=made)
    (page,) = plan.filled([plan.Page("page", plan.PageFile(), [section])], records.find([tmp_path]))

    def draw(name):
        panels = 2 if name in ("controls", "roles") else 1
        _, found = pyplot.subplots(panels)
        pictures._DRAWN[name](found, list(page.sections[0].jobs))
        return found

    yield draw
    pyplot.close("all")


def curves(panel):
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in panel.get_lines()}


def test_losses_are_means_over_seeds_in_the_order_of_steps(axes):
    found = curves(axes("loss"))
    assert found["adamw"] == ([100, 200, 300, 400], pytest.approx([5.35, 5.1, 4.85, 4.6]))
    assert found["adafrugal"] == ([100, 200, 300, 400], pytest.approx([4.75, 4.5, 4.25, 4.0]))


def test_the_trade_off_has_a_point_at_the_end_and_a_line_from_the_start(axes, monkeypatch):
    monkeypatch.setattr(pictures, "FAR", 2)
    panel = axes("tradeoff")
    lines = [(list(line.get_xdata()), list(line.get_ydata())) for line in panel.get_lines()]
    mean = (2.0**4.5 + 2.0**4.7) / 2
    assert ([4.0, 4.0], [pytest.approx(mean)] * 2) in lines
    assert ([3.0, 1.0], [16.0, 16.0]) in lines
    assert ([1.0], [16.0]) in lines
    assert named(panel) == ["adamw, 24.3", "adafrugal, 16.0"]
    assert panel.get_xlim()[0] == 0


def test_what_is_far_above_the_best_stands_at_the_edge_and_says_so(axes):
    panel = axes("tradeoff")
    assert named(panel) == ["adamw, 24.3 (above)", "adafrugal, 16.0"]
    lines = [(list(line.get_xdata()), list(line.get_ydata())) for line in panel.get_lines()]
    assert ([4.0], [panel.get_ylim()[1]]) in lines


def named(panel):
    return [text.get_text() for text in panel.get_legend().get_texts()]


def test_only_arms_that_have_controls_have_their_curves(axes):
    density, interval = axes("controls")
    assert curves(density) == {"adafrugal": ([100, 200, 300, 400], pytest.approx([0.2, 0.15, 0.1, 0.05]))}
    assert curves(interval) == {"adafrugal": ([100, 200, 300, 400], [25, 50, 75, 100])}


def test_state_is_in_mib(axes):
    found = curves(axes("state"))
    assert found["adamw"][1] == pytest.approx([4, 4, 4, 4])
    assert found["adafrugal"][1] == pytest.approx([2.5, 2.0, 1.5, 1.0])


def test_time_is_a_share_of_forward_and_backward(axes):
    panel = axes("time")
    widths = {bars.get_label(): [bar.get_width() for bar in bars] for bars in panel.containers}
    assert widths["forward"] == pytest.approx([1 / 3, 1 / 3])
    assert widths["optimizer"] == pytest.approx([0.2, 0.1])
    assert widths["checkpoint"] == [0, 0]
    ends = [max(bar.get_x() + bar.get_width() for bars in panel.containers for bar in [bars[row]]) for row in (0, 1)]
    assert ends == pytest.approx([3.6 / 3 + 0.2, 3.6 / 3 + 0.1])
    assert [label.get_text() for label in panel.get_yticklabels()] == ["adamw", "adafrugal"]


def test_the_state_is_stacked_by_what_it_is_of(axes):
    """AdamW's four MiB are all of tensors that are always state-full; of AdaFRUGAL's half a MiB is, and stays."""
    heights = []
    for panel in axes("roles"):
        edges = [layer.get_paths()[0].vertices for layer in panel.collections]  # of each layer, there and back
        heights.append([sorted({round(y, 3) for x, y in edge if x == 100}) for edge in edges])
    adamw, adafrugal = heights
    assert adamw == [[0.0, 3.75], [3.75], [3.75, 4.0]]
    assert adafrugal == [[0.0, 0.5], [0.5, 2.25], [2.25, 2.5]]


def test_the_memory_is_what_the_process_holds_or_a_gpus_peak(axes):
    found = curves(axes("memory"))
    assert found["adafrugal"] == ([100, 200, 300, 400], [501, 502, 503, 504])
    assert pictures._in_use({"peak": 2**20, "resident": 5}) == 1
    assert pictures._in_use({}) is None
