"""Which run is it? The one with these settings. Needs no torch: a finished run is recognised at once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from adafrugal.optim import controls
from adafrugal.settings.schema import Settings

# Where and how a run is made, not what it is.
NOT_PART = (
    "arm",  # stands in the directory's name
    "run_root",
    "cache_root",
    "tracking",
    "checkpoint",
    "trainer.micro_batch_size",
    "trainer.compile",
    "trainer.compile_mode",
    "model.loss_chunk_rows",  # the same loss up to the order of a sum
    "trainer.device",
    "trainer.parallel",
    "trainer.replicas",
    "trainer.offload",
    "trainer.timeout",
    "trainer.update_in_backward",
    "trainer.activation_checkpointing",
    "task.lr",  # counts where optimizer.lr refers to it
    "data.store",  # gone; old records have it
    "data.store_limit_gib",
    "data.processes",
    "optimizer.fused",
    "optimizer.compile",
)
CONTROLS = ("optimizer.density", "optimizer.rank", "optimizer.interval")


@dataclass(frozen=True)
class Identity:
    """A run's place among all runs.

    Args:
        directory: `<run_root>/<task>-<data>-<model>/<arm>-<hash>`.
        key: `<arm>-<hash>`.
        labels: task, data, model, arm and seed, by which reports select.
    """

    directory: Path
    key: str
    labels: dict[str, Any]


def identify(settings: Settings, choices: Mapping[str, str]) -> Identity:
    """The identity of a run; `choices` are the files chosen for each group."""
    labels = {group: choices[group] for group in ("task", "data", "model")} | {"arm": settings.arm}
    digest = hashlib.sha256(json.dumps(differing(settings), sort_keys=True).encode()).hexdigest()[:10]
    key = f"{settings.arm}-{digest}"
    setting = "-".join(labels[group] for group in ("task", "data", "model"))
    return Identity(Path(settings.run_root).absolute() / setting / key, key, labels | {"seed": settings.seed})


def differing(settings: Settings) -> dict[str, Any]:
    """The settings that differ from the schema's defaults, by dotted name.

    Only these are hashed, so that a setting added later, with a default that changes nothing, leaves the identity
    of old records alone.
    """
    return dict(_differing(settings, ""))


def still_part(differs: Mapping[str, Any]) -> dict[str, Any]:
    """What `differing` gave to an older version of this code, without the names that are no part of it any more."""
    return {name: value for name, value in differs.items() if name not in NOT_PART}


def _differing(node: Any, path: str) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    defaults = type(node)()
    for field in fields(node):
        name, value = f"{path}{field.name}", getattr(node, field.name)
        if name in NOT_PART:
            continue
        if is_dataclass(value):
            found += _differing(value, f"{name}.")
        elif name in CONTROLS and isinstance(value, Mapping):
            found += _control(name, value)
        elif field.name == "kind" or value != getattr(defaults, field.name):
            found.append((name, value))
    return found


def _control(name: str, value: Mapping[str, Any]) -> list[tuple[str, Any]]:
    kind = {**controls.DENSITIES, **controls.INTERVALS}[value["kind"]]
    defaults = {f.name: f.default for f in fields(kind)}
    different = {key: v for key, v in value.items() if key == "kind" or v != defaults[key]}
    return [(f"{name}.{key}", v) for key, v in different.items()]
