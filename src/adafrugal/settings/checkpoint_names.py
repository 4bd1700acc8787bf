"""Checkpoints that a run begins from: as paths, and by names that stay when a run_root moves."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from adafrugal.system.errors import SettingError

_is_directory = os.path.isdir  # which answers for any text, as Path's own does not
_STEP = re.compile(r"step-(\d+)")
_NAME = re.compile(r"(.+)/step-(\d+)")


def is_checkpoint(path: str) -> bool:
    """Return whether a path has the form of a checkpoint's in its run: …/<key>/checkpoints/step-00000100."""
    place = Path(path)
    return bool(_STEP.fullmatch(place.name)) and place.parent.name == "checkpoints"


def is_of_a_run(path: str) -> bool:
    """Return whether a path is a run's directory, or has the form of a checkpoint's in one."""
    return is_checkpoint(path) or _is_directory(f"{path}/checkpoints")


def name(path: str) -> str:
    """Return a checkpoint's name, <key>/step-100, from its path, or from its name; a run's directory has its key."""
    return f"{Path(path).parents[1].name}/step-{step(path)}" if is_checkpoint(path) else path


def key(name: str) -> str:
    """Return the key of a checkpoint's run from its name."""
    return name.partition("/")[0]


def step(path: str) -> int:
    """Return the step of a checkpoint from its path."""
    return int(Path(path).name.removeprefix("step-"))


def run_of(path: str) -> Path:
    """Return the directory of a run from its path, or from that of its checkpoints."""
    place = _resolved(path)
    return place.parent if place.name == "checkpoints" else place


def _resolved(path: str) -> Path:
    return Path(path) if "\0" in path else Path(path).resolve()  # any text may be typed


def steps(path: str, known: Iterable[str]) -> list[int]:
    """Return the steps of a run among names of checkpoints (`name`); its directory, `path`, need not exist."""
    key, found = run_of(path).name, (_NAME.fullmatch(at) for at in known)
    return [int(match[2]) for match in found if match and match[1] == key]


def may_mean(given: str | None, known: str | None) -> bool:
    """Return whether a setting that is given so may have been recorded so (`name`)."""
    if given is None or known is None:
        return given == known
    return known in (given, name(str(_resolved(given)))) or bool(steps(given, [known]))


def located(setting: str, given: str, before: Sequence[int]) -> str:
    """Return the absolute path of the checkpoint that a setting means.

    A path to a checkpoint need not exist, since a run that has begun does not need it. A run's directory means the
    checkpoint with which a run of these settings began before, else the newest.

    Args:
        setting: its name.
        given: a run's directory, or a checkpoint in it.
        before: the steps of the checkpoints in it with which runs of these settings began.

    Raises:
        SettingError: there is no checkpoint.
    """
    place = _resolved(given)
    if is_checkpoint(str(place)):
        return str(place)
    run = run_of(given)
    inside = run.glob("checkpoints/step-*") if _is_directory(run) else ()
    found = [step(str(path)) for path in inside if is_checkpoint(str(path))]
    if not (before or found):
        such = "such as runs/pretrain-embedded-llama_3m/adafrugal-a78b40b200, or one of its checkpoints/step-…"
        raise SettingError(f"{setting} is {given}, which has no checkpoint; allowed: a run's directory, {such}")
    return str(run / "checkpoints" / f"step-{max(before or found):08d}")


def recorded(run: Path) -> dict[str, Any]:
    """Return the environment.json of a run's record; empty if there is none that can be read."""
    try:
        found: dict[str, Any] = json.loads((run / "environment.json").read_text())
    except (OSError, ValueError):
        return {}
    return found
