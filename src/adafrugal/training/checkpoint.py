"""What a run continues from: the model as transformers reads it, and beside it everything else as tensors and numbers.

checkpoints/step-00000100/
model.safetensors, config.json   for `from_pretrained`, and a tokenizer's files where the task has one; LoRA's names are
                                 those of peft's `inject_adapter_in_model`
state.pt                         optimizer, schedule, random state, progress; loads with weights_only=True
checksums.json                   SHA-256 of each of these files, by which a damaged one is found out
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch

from adafrugal.config import TrainingError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Saved = PreTrainedModel | PreTrainedTokenizerBase

CHECKSUMS = "checksums.json"


def save(root: Path, step: int, parts: Iterable[Saved], state: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint beside its place, move it there when it is whole, and drop all but the newest `keep`."""
    final = root / f"step-{step:08d}"
    beside = root / f".{final.name}.new"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    for part in parts:
        part.save_pretrained(beside)
    torch.save(state, beside / "state.pt")
    (beside / CHECKSUMS).write_text(
        json.dumps({file.name: _digest(file) for file in sorted(beside.iterdir())}, indent=2)
    )
    for file in (*beside.iterdir(), beside):
        _to_disk(file)
    beside.rename(final)
    _to_disk(root)
    for old in _all(root)[:-keep]:
        shutil.rmtree(old)
    return final


def latest(root: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint; None where there is none at all.

    Damaged ones that are newer are put aside, so that they take nobody's place among those that are kept.

    Args:
        root: where they are.
        warn: told of each that is damaged, in a sentence.

    Raises:
        TrainingError: there are some, and all of them are damaged. To begin anew is somebody's decision, not ours.
    """
    found = _all(root)
    damaged = []
    for directory in reversed(found):
        damage = _damage(directory)
        if damage is None:
            for other in damaged:
                aside = root / f".{other.name}.damaged"
                shutil.rmtree(aside, ignore_errors=True)
                other.rename(aside)
            return directory
        warn(f"the checkpoint {directory.name} is damaged ({damage}) and not used")
        damaged.append(directory)
    if found:
        raise TrainingError(
            f"none of the {len(found)} checkpoints in {root} can be read; remove the run's directory to begin anew"
        )
    return None


def _damage(directory: Path) -> str | None:
    """What is wrong with a checkpoint's files; None where they are as they were written."""
    try:
        checksums = json.loads((directory / CHECKSUMS).read_text())
        for name, digest in checksums.items():
            if _digest(directory / name) != digest:
                return f"{name} is not as it was written"
    except OSError as error:
        return f"{Path(error.filename).name}: {error.strerror}"
    except (ValueError, AttributeError):
        return f"{CHECKSUMS} cannot be read"
    return None


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def load_state(directory: Path) -> dict[str, Any]:
    """All of a checkpoint but the weights, on the CPU."""
    return torch.load(directory / "state.pt", map_location="cpu", weights_only=True)


def load_model(directory: Path, model: PreTrainedModel) -> None:
    """Put a checkpoint's weights into `model`; an error where they do not fit."""
    safetensors.torch.load_model(model, directory / "model.safetensors", strict=True)


def _to_disk(path: Path) -> None:
    """Wait until a file, or the names in a directory, would survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _all(root: Path) -> list[Path]:
    return sorted(root.glob("step-*"))
