"""What a run continues from: the model as transformers reads it, and beside it everything else as tensors and numbers.

checkpoints/step-00000100/
model.safetensors, config.json   for `from_pretrained`, and a tokenizer's files where the task has one; LoRA's names are
                                 those of peft's `inject_adapter_in_model`
state.pt                         optimizer, schedule, random state, progress; loads with weights_only=True
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Saved = PreTrainedModel | PreTrainedTokenizerBase


def save(root: Path, step: int, parts: Iterable[Saved], state: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint beside its place, move it there when it is whole, and drop all but the newest `keep`."""
    final = root / f"step-{step:08d}"
    beside = root / f".{final.name}.new"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    for part in parts:
        part.save_pretrained(beside)
    torch.save(state, beside / "state.pt")
    for file in (*beside.iterdir(), beside):
        _to_disk(file)
    beside.rename(final)
    _to_disk(root)
    for old in _all(root)[:-keep]:
        shutil.rmtree(old)
    return final


def latest(root: Path) -> Path | None:
    """The newest whole checkpoint, if there is one."""
    found = _all(root)
    return found[-1] if found else None


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
