"""Quality against memory: where points, bars, lines and names are."""

import matplotlib
import pytest
from made import recorded, section

from adafrugal.reports import frontier
from adafrugal.reports.arms import jobs

BASE = "scale=mini data=embedded"
LOSSES = {  # at 200 steps, and at 400
    "adamw": (4.8, 4.5), "frugal": (4.6, 4.4), "adafrugal": (4.4, 4.3), "frugal_0": (4.9, 4.6), "badam": (6.1, 6.0)
}  # fmt: skip
SIZES = {"adamw": (4, 4), "adafrugal": (3, 1)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Records of all arms at two lengths, with two seeds."""
    root = tmp_path_factory.mktemp("runs")
    for arm, losses in LOSSES.items():
        for steps, loss in zip((200, 400), losses, strict=True):
            for seed in (0, 1):
                words = f"experiments=c4_60m/{arm} {BASE} trainer.steps={steps}"
                loss_of_seed = loss + seed * (0.001 if arm == "adamw" else 0.003)
                recorded(root, words, loss_of_seed, seed, SIZES.get(arm, (2, 2)))
    return root


@pytest.fixture
def draw(runs):
    """A function: kind, steps -> the panels."""
    from matplotlib import pyplot

    matplotlib.use("Agg")

    def panels(kind, steps, count):
        names = ",".join(f"c4_60m/{arm}" for arm in (*LOSSES, "galore"))
        made = section(jobs([f"-m experiments={names} {BASE} seed=0,1 trainer.steps={steps}"]), runs, kind=kind)
        _, axes = pyplot.subplots(count, sharex=True)
        frontier.draw(axes, made)
        return axes

    yield panels
    pyplot.close("all")


def lines(axes):
    return [(list(line.get_xdata()), list(line.get_ydata()), line.get_markerfacecolor()) for line in axes.get_lines()]


def names(axes):
    """Name -> where its point is."""
    return {note.get_text(): pytest.approx(note.xy) for note in axes.texts}


def test_an_arm_has_a_hollow_start_a_filled_end_a_bar_and_its_name(draw):
    panel = draw("comparison", 400, 1)
    top = panel.get_ylim()[1]
    assert names(panel) == {
        "adamw": (4, 4.5005), "frugal": (2, 4.4015), "adafrugal": (1, 4.3015), "frugal_0": (2, 4.6015),
        "badam, 6.00 (above)": (2, top),
    }  # fmt: skip
    height = pytest.approx([4.3015])
    drawn = [line for line in lines(panel) if line[1] == height]
    assert [(x, color) for x, _, color in drawn] == [([3], "white"), ([1], "C2")]
    assert ([3, 1], pytest.approx([4.3015] * 2), "C2") in lines(panel)
    assert ([0, 1], pytest.approx([4.5005] * 2), "grey") in lines(panel), "the reference's loss, across the axes"
    bars = {bar.get_segments()[0][0][0]: bar.get_segments()[0][:, 1] for bar in panel.collections}
    half = 12.7062 * 0.003 / 2
    low, high = panel.get_ylim()
    assert all(low < end < high for bar in bars.values() for end in bar), "no bar is cut"
    assert list(bars[1]) == pytest.approx([4.3015 - half, 4.3015 + half], abs=1e-4)
    assert len(panel.collections) == 4, "none at the edge"


def test_lengths_have_a_panel_of_steps(draw):
    losses, steps = draw("lengths", "200,400", 2)
    assert names(losses)["frugal"] == (2, 4.4015)
    where = names(steps)
    assert {*where} == {"adamw", "frugal", "adafrugal, ≤ 50%"}
    assert where["adamw"] == (4, 1)
    assert where["adafrugal, ≤ 50%"] == (1, steps.get_ylim()[0])
    share = 0.5 ** (1 - (0.1 + 0.001) / 0.2)  # differences of 0.101 and −0.099
    assert where["frugal"] == (2, pytest.approx(share))
    assert steps.get_title() == "not reached: frugal_0, badam"
    assert losses.get_xlim() == steps.get_xlim() == (0, pytest.approx(1.08 * 4))
