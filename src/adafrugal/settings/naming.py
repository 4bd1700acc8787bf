"""Short names: of settings beside their values, and of a run among others of its arm."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from adafrugal.settings import checkpoint_names
from adafrugal.settings.identity import CHECKPOINTS, NOT_PART
from adafrugal.settings.schema import Settings

SHORT = {
    "optimizer.lr": "lr", "optimizer.split_lr_scale": "s", "optimizer.state_free_lr_scale": "c",
    "optimizer.density": "ρ", "optimizer.interval": "T", "optimizer.density.end": "ρ_end",
    "optimizer.density.steps": "K", "optimizer.interval.threshold": "τ", "optimizer.interval.factor": "γ",
    "data.seed": "data.seed",
}  # fmt: skip
_LONGEST = 128  # characters of a name that W&B takes
# the directories of an absolute path: "/" after no part of a path, to the last "/" before a character of a path
_DIRECTORIES = re.compile(r"""(?<![\w.~*/-])/(?!/)(?:[^,{}'"\[\]]*/)?(?=[^,{}'"\[\]/])""")
_FLOAT = re.compile(r"[+-]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][+-]?\d+)?")  # 1e-3, 2., .5
# settings that do not change what a run comes to; task.lr does, by way of optimizer.lr
_LEFT_OUT = ("trainer.log_every", *(name for name in NOT_PART if name != "task.lr"))
_SAID_ELSEWHERE = {"task", "data", "model", "optimizer", "seed", "sweeps"}  # by W&B's group, the arm, or at the end


def short(name: str) -> str:
    """Return the short name of a setting, such as optimizer.lr, or of a group, such as optimizer/density.

    The `kind` of a part and its `value` have the part's name.
    """
    whole = name.replace("/", ".").removesuffix(".kind").removesuffix(".value")
    return SHORT.get(whole, whole.rpartition(".")[2])


def shown(settings: Mapping[str, Any]) -> str:
    """Return settings in short with their values, numbers in one spelling: lr=0.001 ρ=0.25.

    It names rows of tables, runs at W&B and on the page of running ones. Values are as typed or as composed.
    """
    found = {short(name): _spelled(name, value) for name, value in settings.items()}  # of kind and value the latter
    return " ".join(f"{name}={value}" for name, value in found.items())


def _spelled(name: str, value: Any) -> str:
    if value in (None, "null"):
        return "all" if name == "optimizer.density.steps" else "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) or _FLOAT.fullmatch(str(value)):
        return repr(float(value)).removesuffix(".0")
    return str(value)


def run_name(arm: str, seed: int, words: Iterable[str]) -> str:
    """Return a run's name: its arm, what was typed beside the arm's or the experiment's defaults, and its seed.

    It is shown to others: a checkpoint has its name, and a path its last part. What is too long loses its end, and
    keeps the seed.

    Args:
        arm: of the run.
        seed: of the run.
        words: as typed after train.py, or by a sweep for one job. Those that do not change what a run is are left out.
    """
    parts = []
    for word in words:
        name, _, value = word.lstrip("+").partition("=")
        is_elsewhere = name in _SAID_ELSEWHERE or name.startswith(("~", *_LEFT_OUT))
        if name == "experiments":
            last = value.rpartition("/")[2]
            parts += [last] if last != arm else []
        elif not is_elsewhere:
            parts.append(shown({name: _public(name, value)}))
    end = f" seed={seed}"
    return " ".join([arm, *parts])[: _LONGEST - len(end)] + end


def _public(name: str, value: str) -> str:
    """Return a value without this machine's directories."""
    if name in CHECKPOINTS:
        is_path = value.count("/") > 1 and not checkpoint_names.is_checkpoint(value)  # a repository is owner/name
        value = checkpoint_names.run_of(value).name if is_path else checkpoint_names.name(value)
    return _DIRECTORIES.sub("", value)


def name_run(settings: Settings, words: Iterable[str]) -> None:
    """Fill in `tracking.name` of a run at W&B that has none."""
    tracking = settings.tracking
    if tracking.kind == "wandb" and tracking.name is None:
        tracking.name = run_name(settings.arm or "", settings.seed, words)
