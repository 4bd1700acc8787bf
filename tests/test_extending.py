"""Each program of docs/extending.md, as it stands there; what `register` takes and refuses; and `adafrugal.train`."""

import re
from dataclasses import dataclass
from typing import ClassVar

import pytest
from conftest import REPOSITORY
from hydra.core.config_store import ConfigStore
from own_parts import ColumnNorm, MatrixNorm, Trend

import adafrugal
from adafrugal.memory.estimate import estimate
from adafrugal.optim import Rows, choices, controls, register, state_free, subspaces
from adafrugal.settings import compose
from adafrugal.settings.identity import differing
from adafrugal.system.errors import SettingError

PAGE = (REPOSITORY / "docs" / "extending.md").read_text()
PROGRAMS = dict(re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?```python\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE))
pytestmark = pytest.mark.usefixtures("no_estimate", "registered")


@pytest.fixture
def registered():
    """Take back what a test registers."""
    compose.register()
    tables = [choices.STATE_FREE, choices.SEEN_BY, choices.SUBSPACES, choices.POLICIES, *choices.OWN.values(),
              controls.DENSITIES, controls.INTERVALS, state_free.STATE_FREE, subspaces.SUBSPACES]  # fmt: skip
    tables += [ConfigStore.instance().repo["optimizer"].setdefault(group, {}) for group in ("density", "interval")]
    before = [dict(table) for table in tables]
    yield
    for table, content in zip(tables, before, strict=True):
        table.clear()
        table.update(content)
    compose._files.cache_clear()


@pytest.fixture
def trains(monkeypatch, cache_root, tmp_path):
    """`adafrugal.train` in a directory of its own, with the text that other tests have prepared."""
    train, places = adafrugal.train, [f"run_root={tmp_path / 'runs'}", f"cache_root={cache_root}", "tracking=local"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(adafrugal, "train", lambda words: train([*words, *places]))
    return adafrugal.train


@pytest.mark.parametrize("part", PROGRAMS)
def test_the_program_runs(part, trains, capsys):
    exec(PROGRAMS[part], {"__name__": "__main__"})
    printed = capsys.readouterr().out.rstrip().splitlines()
    ends = {
        "A state-free rule": lambda: 5 < float(printed[-1]) < 7,
        "A density or an interval": lambda: printed[-1].startswith("[0.5,") and printed[-1].endswith("0.05]"),
        "A subspace": lambda: "'start':" in printed[-1],
        "A table": lambda: sum(line.startswith("| state_free=") and "| 2 |" in line for line in printed) == 2,
    }
    assert ends[part](), printed[-8:]


def test_there_is_a_program_for_each_part():
    assert list(PROGRAMS) == ["A state-free rule", "A density or an interval", "A subspace", "A table"]


# -- names in settings ------------------------------------------------------------------------------------------------


def test_a_registered_kind_can_be_named_and_a_run_is_known_by_its_settings():
    register(ColumnNorm)
    register(Trend, of="density")
    density = ["optimizer/density=own_trend", "optimizer.density.start=0.4"]
    found = compose.settings(["optimizer=frugal", *density, "optimizer.state_free={kind:own_colnorm,eps:1e-6}"])
    assert differing(found)["optimizer.state_free"] == {"kind": "own_colnorm", "eps": 1e-6}
    assert {k: v for k, v in differing(found).items() if "density" in k} == {
        "optimizer.density.kind": "own_trend", "optimizer.density.start": 0.4,
    }  # fmt: skip
    usual = compose.settings(["optimizer=adafrugal", "optimizer.state_free={kind:own_colnorm,eps:1e-8}"])
    assert usual.optimizer.state_free == "own_colnorm"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["optimizer.state_free=own_matrixnorm"], "did you mean own_norm.*allowed: signsgd, sgd, none, whiten"),
        (["optimizer.state_free={kind:own_norm,esp:1}"], "optimizer.state_free.esp: no such setting; did you mean eps"),
        (["optimizer.state_free={kind:checked,least:-1}"], "optimizer.state_free: least is -1; 0 or more is needed"),
        (
            ["optimizer.state_free=own_norm", "optimizer.modules.norms=state_free"],
            "optimizer.modules.norms is 'state_free'; allowed: state_full or frozen with optimizer.state_free=own_norm",
        ),
        (
            ["optimizer=adafrugal", "optimizer/density=own_trend", "optimizer.density.every=7"],
            "density observes a loss every 7 steps, validation and optimizer.interval observes a loss every 25 steps",
        ),
        (
            ["optimizer=frugal", "optimizer/density=plain", "optimizer.fit_gib=4"],
            "optimizer.fit_gib is 4.0; allowed: null with a density of your own that has no start",
        ),
    ],
)
def test_settings_of_a_registered_kind_are_checked_before_a_run(words, says):
    @register
    @dataclass(frozen=True)
    class Checked(MatrixNorm):
        kind: ClassVar[str] = "checked"
        least: float = 0.0

        def __post_init__(self):
            if self.least < 0:
                raise ValueError(f"least is {self.least}; 0 or more is needed")

    @dataclass
    class Plain(controls.Control):
        kind: ClassVar[str] = "plain"

        def at(self, step):
            return 0.5

    register(MatrixNorm)
    register(Trend, of="density")
    register(Plain, of="density")
    with pytest.raises(SettingError, match=says):
        compose.settings(words)


def test_a_density_is_shown_losses_as_often_as_it_asks(trains):
    register(Trend, of="density")
    density = ["optimizer/density=own_trend", "optimizer.density.every=3"]
    record = trains(["scale=smoke", "optimizer=frugal", *density, "eval.every=100"])
    evaluated = [line["step"] for line in record.metrics() if "validation_loss" in line]
    assert evaluated == [3, 6, 9, 12, 15, 18, 20]
    assert record.metrics()[-1]["density"] < 0.5


def test_the_memory_of_a_run_with_a_rule_of_ones_own_is_estimated():
    """By steps on fake tensors; such a rule keeps no state."""
    register(MatrixNorm)
    words = ["scale=smoke", "optimizer=frugal", "optimizer.subspace=columns"]
    own, signs = (estimate(compose.settings([*words, f"optimizer.state_free={r}"])) for r in ("own_norm", "signsgd"))
    assert own.first_state == signs.first_state
    assert [stage.state for stage in own.stages] == [stage.state for stage in signs.stages]


# -- what cannot be registered ----------------------------------------------------------------------------------------


class Nameless(Rows):
    kind = None


class Signs(MatrixNorm):
    kind = "signsgd"


class Falls(Trend):
    kind = "loss_aware"


@pytest.mark.parametrize(
    ("part", "of", "says"),
    [
        (Nameless, None, "Nameless has no kind; give it one"),
        (Signs, None, "Signs has the kind 'signsgd' of SignSGD; give it a kind of its own"),
        (Falls, "density", "Falls has the kind 'loss_aware' of LossAware"),
        (Trend, None, "Trend is a control of None; allowed: density, interval"),
        (ColumnNorm, "density", "ColumnNorm of density cannot be registered; allowed: a class derived"),
        (dict, None, "dict cannot be registered"),
    ],
)
def test_what_cannot_be_registered_is_refused(part, of, says):
    with pytest.raises(ValueError, match=says):
        register(part, of)


def test_a_class_that_is_defined_anew_takes_the_place_of_the_one_before():
    def defined():
        class Again(Rows):
            kind = "again"

        return register(Again)

    first, second = defined(), defined()
    assert subspaces.SUBSPACES["again"] is second is not first


def test_a_wrong_word_is_a_setting_error_and_nothing_is_run(trains, tmp_path):
    with pytest.raises(SettingError, match="did you mean adafrugal"):
        trains(["optimizer=adafrugl"])
    assert not (tmp_path / "runs").exists()
