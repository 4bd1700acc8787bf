"""The identity of a run: a hash of its settings, without those that decide only where and how it runs.

Needs no torch, so that a finished run is recognised at once.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from adafrugal.optim import controls
from adafrugal.settings import checkpoint_names
from adafrugal.settings.schema import Settings

NOT_PART = (
    "arm", "run_root", "cache_root", "tracking", "checkpoint",  # the arm is in the directory's name
    "trainer.micro_batch_size", "trainer.compile", "trainer.compile_mode", "trainer.device", "trainer.parallel",
    "trainer.replicas", "trainer.offload", "trainer.timeout", "trainer.update_in_backward",
    "trainer.activation_checkpointing", "trainer.memory_limit_gib",
    "model.loss_chunk_rows",  # the same loss up to the order of a sum
    "task.lr",  # counted in optimizer.lr, which refers to it
    "data.store_limit_gib", "data.processes",
    "data.store",  # removed; old records have it
    "optimizer.fused", "optimizer.compile", "optimizer.state_on",
)  # fmt: skip
CONTINUE_FROM = "trainer.continue_from"
CHECKPOINTS = ("model.name", "model.weights", CONTINUE_FROM)  # which may name a run's
_CONTROLS = ("optimizer.density", "optimizer.rank", "optimizer.interval")


@dataclass(frozen=True)
class Identity:
    """A run's directory, key and labels."""

    directory: Path  # <run_root>/<task>-<data>-<model>/<arm>-<hash>
    key: str  # <arm>-<hash>
    labels: dict[str, Any]  # task, data, model, arm and seed, by which reports select runs


def identify(settings: Settings, choices: Mapping[str, str]) -> Identity:
    """Return the identity of a run; `choices` maps groups to the chosen files."""
    chosen = {group: choices[group] for group in ("task", "data", "model")}
    key = f"{settings.arm}-{digest(differing(settings))}"
    directory = Path(settings.run_root).absolute() / "-".join(chosen.values()) / key
    return Identity(directory, key, chosen | {"arm": settings.arm, "seed": settings.seed})


def digest(differs: Mapping[str, Any]) -> str:
    """Return the hash of the result of `differing`."""
    return hashlib.sha256(json.dumps(differs, sort_keys=True).encode()).hexdigest()[:10]


def beside(identity: Identity, differs: Mapping[str, Any], *but: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield each run of the same arm in the same directory that differs in the settings `but` alone, with `differing`.

    The run itself is among them, if it has begun.
    """
    arm = glob.escape(identity.key.rpartition("-")[0])
    for run in sorted(identity.directory.parent.glob(f"{arm}-{'[0-9a-f]' * 10}")):
        theirs = checkpoint_names.recorded(run).get("identity", {}).get("differs", {})
        if theirs and all(theirs.get(name, ...) == differs.get(name, ...) for name in {*theirs, *differs} - {*but}):
            yield run, theirs


def locate_checkpoints(settings: Settings, choices: Mapping[str, str]) -> None:
    """Replace each setting of `CHECKPOINTS` that names a run, or its checkpoint, by the checkpoint's absolute path.

    A run that is gone is known by the runs that began with it.
    """
    places = {name: (getattr(settings, group), key) for name in CHECKPOINTS for group, _, key in [name.rpartition(".")]}
    given = {name: value for name, place in places.items() if (value := getattr(*place, None)) is not None}
    if not given:
        return
    for name in given:  # so that what one of them comes to does not hide the runs by which another is known
        setattr(*places[name], None)
    alike = [
        theirs
        for _, theirs in beside(identify(settings, choices), differing(settings), *CHECKPOINTS)
        if all(checkpoint_names.may_mean(given.get(name), theirs.get(name)) for name in CHECKPOINTS)
    ]
    for name, value in given.items():
        before = checkpoint_names.steps(value, (theirs[name] for theirs in alike))
        is_of_a_run = before or name == CONTINUE_FROM or checkpoint_names.is_of_a_run(value)
        setattr(*places[name], checkpoint_names.located(name, value, before) if is_of_a_run else value)


def differing(settings: Any, path: str = "") -> dict[str, Any]:
    """Return the settings that differ from the schema's defaults, by dotted name below `path`.

    Only these are hashed, so that a new setting whose default changes nothing does not change the identity of old
    records.
    """
    defaults, found = type(settings)(), {}
    for field in fields(settings):
        name, value = f"{path}{field.name}", getattr(settings, field.name)
        if name in NOT_PART:
            continue
        if is_dataclass(value):
            found |= differing(value, f"{name}.")
        elif name in _CONTROLS and isinstance(value, Mapping):
            usual = {f.name: f.default for f in fields((controls.DENSITIES | controls.INTERVALS)[value["kind"]])}
            found |= {f"{name}.{key}": v for key, v in value.items() if key == "kind" or v != usual[key]}
        elif name in CHECKPOINTS and value is not None:
            found[name] = checkpoint_names.name(value)
        elif field.name == "kind" or value != getattr(defaults, field.name):
            found[name] = value
    return found


def still_part(differs: Mapping[str, Any]) -> dict[str, Any]:
    """Drop names that are no longer part of the identity from the result of an older version of `differing`."""
    return {name: value for name, value in differs.items() if name not in NOT_PART}
