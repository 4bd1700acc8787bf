"""The content of pictures, read from matplotlib's own objects."""

import matplotlib
import pytest
from made import recorded, section

from adafrugal.reports import curves as curves_of_searches
from adafrugal.reports import pictures
from adafrugal.reports.arms import jobs
from adafrugal.reports.searches import SearchFile

STEPS = [100, 200, 300, 400]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """AdamW with two seeds and AdaFRUGAL with one."""
    root, base = tmp_path_factory.mktemp("runs"), "scale=mini data=embedded"
    for seed in (0, 1):
        recorded(root, f"experiments=c4_60m/adamw {base}", 4.5 + seed / 5, seed, state=(4, 4), share=0.2)
    recorded(root, f"experiments=c4_60m/adafrugal {base}", 4.0, 0, state=(3, 1), share=0.1)
    return section(jobs([f"-m experiments=c4_60m/adamw,c4_60m/adafrugal seed=0,1 {base}"]), root)


@pytest.fixture
def axes(drawn):
    """A function: picture -> its axes."""
    from matplotlib import pyplot

    matplotlib.use("Agg")

    def draw(name):
        _, found = pyplot.subplots(2 if name in ("controls", "roles") else 1)
        pictures.DRAWN[name][1](found, drawn)
        return found

    yield draw
    pyplot.close("all")


def curves(panel):
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in panel.get_lines()}


@pytest.mark.parametrize(("name", "adamw", "adafrugal"), [
    ("loss", [5.35, 5.1, 4.85, 4.6], [4.75, 4.5, 4.25, 4.0]),  # means over seeds, in the order of steps
    ("validation", [5.1, 5.1, 4.85, 4.6], [4.5, 4.5, 4.25, 4.0]),
    ("state", [4, 4, 4, 4], [2.5, 2.0, 1.5, 1.0]),  # MiB
    ("memory", [501, 502, 503, 504], [501, 502, 503, 504]),
])  # fmt: skip
def test_curves_are_means_over_seeds(axes, name, adamw, adafrugal):
    found = list(curves(axes(name)).values())
    assert found == [(STEPS, pytest.approx(adamw)), (STEPS, pytest.approx(adafrugal))]


@pytest.mark.parametrize("name", ["loss", "validation"])
def test_losses_have_a_band_from_the_lowest_to_the_highest_seed_and_say_so(axes, name):
    panel = axes(name)
    (band,) = panel.collections  # AdamW's
    assert {round(y, 3) for x, y in band.get_paths()[0].vertices if x == 400} == {4.5, 4.7}
    assert named(panel) == ["adamw, 2 seeds", "adafrugal, 1 seed"]
    assert panel.get_xlabel().endswith("lines: means over seeds; bands: from the lowest to the highest seed")


def with_lines(run, key, *lines):
    """The run with these (step, loss) in place of its own."""
    run.write_metrics({"step": step, key: loss} for step, loss in lines)


@pytest.mark.parametrize(("name", "key"), [("loss", "loss"), ("validation", "validation_loss")])
def test_every_arm_has_points_at_the_same_steps(tmp_path, name, key):
    """AdaFRUGAL, which evaluates more often, has more lines of fewer steps, and one of it has no number."""
    from matplotlib import pyplot

    base = "scale=mini data=embedded"
    adamw, adafrugal, short = (f"experiments=c4_60m/{arm} {base}" for arm in ("adamw", "adafrugal", "frugal"))
    with_lines(recorded(tmp_path, adamw), key, (20, 5.0), (40, 4.0), (50, 3.0), (60, 4.5), (80, 4.0))
    more = ((5, 9.0), (20, 5.0), (30, 4.0), (40, float("nan")), (50, 1.0), (60, 3.0), (80, 3.5))
    with_lines(recorded(tmp_path, adafrugal), key, *more)
    branched = recorded(tmp_path, short)
    branched.write_summary(branched.summary() | {"continued_from": {"run": "another", "step": 40}})
    with_lines(branched, key, (50, 4.0), (60, 2.0))
    _, panel = pyplot.subplots()
    pictures.DRAWN[name][1](panel, section(jobs([adamw, adafrugal, short]), tmp_path))
    points = {label.partition(",")[0]: dict(zip(*xy, strict=True)) for label, xy in curves(panel).items()}
    if name == "loss":
        assert points["adamw"] == pytest.approx({20: 5.0, 40: 4.0, 60: 3.75, 80: 4.0})
        assert points["adafrugal"] == pytest.approx({20: 6.0, 40: 4.0, 60: 2.0, 80: 3.5})
        assert points["frugal"] == pytest.approx({60: 3.0})
        assert "the mean of the 20 steps up to it" in panel.get_xlabel()
    else:
        assert list(points["adamw"]) == [20, 40, 50, 60, 80] == list(points["adafrugal"])
        assert points["frugal"] == {50: 4.0, 60: 2.0}
        assert "the last point is over 98,304 tokens, the others over 4,096" in panel.get_xlabel()
    pyplot.close("all")


def test_the_legend_has_the_rate_that_was_chosen(tmp_path):
    from matplotlib import pyplot

    words = "experiments=c4_60m/adamw scale=mini data=embedded optimizer.lr="
    for lr, loss in (("0.001", 5.0), ("0.01", 4.0)):
        recorded(tmp_path, f"{words}{lr}", loss)
    _, panel = pyplot.subplots()
    pictures.DRAWN["loss"][1](panel, section(jobs([f"{words}1e-3,1e-2"]), tmp_path, best_of=["optimizer.lr"]))
    assert named(panel) == ["adamw, lr 0.01, 1 seed"]
    assert "seeds" not in panel.get_xlabel(), "there is no band"
    pyplot.close("all")


@pytest.mark.parametrize("steps", [4, 12, 20, 400])
def test_steps_have_whole_round_numbers(steps):
    from matplotlib import pyplot

    _, panel = pyplot.subplots()
    panel.plot([0, steps], [1, 0])
    pictures.step_axis(panel)
    ticks = panel.get_xticks()
    assert all(tick == round(tick) for tick in ticks)
    assert str(ticks[1] - ticks[0]).strip("0.") in ("1", "2", "5")
    pyplot.close("all")


def test_the_memory_is_a_gpus_peak_where_there_is_one():
    assert pictures.in_use({"peak": 2**20, "resident": 5}) == 1
    assert pictures.in_use({}) is None


def test_the_memory_of_a_process_that_made_runs_before_is_not_drawn(tmp_path):
    from matplotlib import pyplot

    arms = [f"experiments=c4_60m/{arm} scale=mini data=embedded" for arm in ("adamw", "adafrugal")]
    for arm, is_alone in zip(arms, (True, False), strict=True):
        run = recorded(tmp_path, arm)
        run.write_summary(run.summary() | {"memory": {"alone": is_alone}})
    _, panel = pyplot.subplots()
    pictures.DRAWN["memory"][1](panel, section(jobs(arms), tmp_path))
    assert list(curves(panel)) == ["adamw"]
    pyplot.close("all")


def test_the_trade_off_has_a_point_at_the_end_and_a_line_from_the_start(axes, monkeypatch):
    monkeypatch.setattr(pictures, "FAR", 2)
    panel = axes("tradeoff")
    lines = [(list(line.get_xdata()), list(line.get_ydata())) for line in panel.get_lines()]
    mean = (2.0**4.5 + 2.0**4.7) / 2
    assert ([4.0, 4.0], [pytest.approx(mean)] * 2) in lines
    assert ([3.0, 1.0], [16.0, 16.0]) in lines and ([1.0], [16.0]) in lines
    assert named(panel) == ["adamw, 24.3", "adafrugal, 16.0"]
    assert panel.get_xlim()[0] == 0


def test_perplexities_far_above_the_best_stand_at_the_edge_and_say_so(axes):
    panel = axes("tradeoff")
    assert named(panel) == ["adamw, 24.3 (above)", "adafrugal, 16.0"]
    assert ([4.0], [panel.get_ylim()[1]]) in [(list(x.get_xdata()), list(x.get_ydata())) for x in panel.get_lines()]


def named(panel):
    return [text.get_text() for text in panel.get_legend().get_texts()]


def test_only_arms_that_have_controls_have_their_curves(axes):
    density, interval = axes("controls")
    assert curves(density) == {"adafrugal": (STEPS, pytest.approx([0.2, 0.15, 0.1, 0.05]))}
    assert curves(interval) == {"adafrugal": (STEPS, [25, 50, 75, 100])}


def test_time_is_a_share_of_forward_and_backward(axes):
    panel = axes("time")
    widths = {bars.get_label(): [bar.get_width() for bar in bars] for bars in panel.containers}
    assert widths["forward"] == pytest.approx([1 / 3, 1 / 3])
    assert widths["optimizer"] == pytest.approx([0.2, 0.1])
    assert widths["checkpoint"] == [0, 0]
    ends = [max(bars[row].get_x() + bars[row].get_width() for bars in panel.containers) for row in (0, 1)]
    assert ends == pytest.approx([3.6 / 3 + 0.2, 3.6 / 3 + 0.1])
    assert [label.get_text() for label in panel.get_yticklabels()] == ["adamw", "adafrugal"]


def test_the_state_is_stacked_by_role(axes):
    """AdamW's four MiB are all of tensors that are always state-full; of AdaFRUGAL's half a MiB is, and stays."""
    heights = []
    for panel in axes("roles"):
        edges = [layer.get_paths()[0].vertices for layer in panel.collections]  # of each layer, there and back
        heights.append([sorted({round(y, 3) for x, y in edge if x == 100}) for edge in edges])
    assert heights == [[[0.0, 3.75], [3.75], [3.75, 4.0]], [[0.0, 0.5], [0.5, 2.25], [2.25, 2.5]]]


def test_searches_have_a_panel_for_each_arm_with_a_line_for_each_rate(tmp_path):
    """Trials at lr·s, lr and, for the part without state, lr·s·c around a best; a search that goes on has no panel."""
    from matplotlib import pyplot

    arms = ",".join(f"c4_60m/{arm}" for arm in ("adamw", "frugal", "frugal_0", "galore", "badam"))
    command = f"experiments={arms} scale=mini data=embedded seed=0"

    def so_far():
        return section(jobs([command]), tmp_path, search=SearchFile(trials=7))

    while pending := [job for each in so_far().searches if each.arm.name != "badam" for job in each.pending]:
        for job in pending:
            lr, s, *c = job.rates.values()
            far = abs(lr * s / 0.002 - 1) + abs(lr / 0.064 - 1) + abs(c[0] - 1 if c else 0)
            recorded(tmp_path, job.command, 4 + far / 10, seed=100)
    found = so_far()
    assert curves_of_searches.shape(found) == (1, 4)
    _, axes = pyplot.subplots(1, 5, squeeze=False)
    pictures.DRAWN["rates"][1](axes, found)
    panels = {panel.get_title(loc="left"): curves(panel) for panel in axes.ravel() if panel.axison}
    assert list(panels) == ["adamw", "frugal", "frugal_0", "galore"]
    for name in ("lr·s", "lr"):
        line = dict(zip(*panels["adamw"][name], strict=True))
        assert [line[factor] for factor in (0.5, 1, 2)] == pytest.approx([0.05, 0, 0.1])
    assert "lr·s·c" in panels["frugal"] and "lr·s·c" not in panels["frugal_0"]
    pyplot.close("all")
