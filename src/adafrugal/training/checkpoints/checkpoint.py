"""What a run continues from: the model as transformers reads it, and beside it everything else as tensors and numbers.

checkpoints/step-00000100/
model.safetensors, config.json   for `from_pretrained`, and a tokenizer's files where the task has one; LoRA's names are
                                 those of peft's `inject_adapter_in_model`
state.pt                         optimizer, schedule, random state, progress; loads with weights_only=True
checksums.json                   SHA-256 of each of these files, by which a damaged one is found out

Of a run whose processes each have a part of the model, the tensors stand in shard-*.safetensors instead, a file a
process (`shards`), and `python -m adafrugal.training` makes the form above of it.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adafrugal.memory import out_of_memory
from adafrugal.system.errors import TrainingError
from adafrugal.system.files import to_disk

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Saved = PreTrainedModel | PreTrainedTokenizerBase

CHECKSUMS = "checksums.json"


def save(
    root: Path,
    step: int,
    parts: Mapping[str, Saved],
    weights: Mapping[str, Tensor],
    state: Mapping[str, Any],
    keep: int,
    best: int | None = None,
) -> Path:
    """Write a checkpoint beside its place, move it there when it is whole, and drop what need not be kept.

    Args:
        root: where checkpoints are.
        step: of this one.
        parts: `model`, and `tokenizer` where there is one, as transformers has them.
        weights: of the model, which may be on its way already.
        state: all the rest.
        keep: so many of the newest stay.
        best: the step of one that stays, too.

    Raises:
        TrainingError: it cannot be written; nothing of it is left, and those before it stay.
        RuntimeError, MemoryError: memory was refused for it; likewise.
    """
    final = root / f"step-{step:08d}"
    beside = root / f".{final.name}.new"
    with _whole_or_not(root, step, beside):
        begin(root, step)
        for name, part in parts.items():
            part.save_pretrained(beside, **({"state_dict": dict(weights)} if name == "model" else {}))
        _finish(beside, state, final)
    _drop(root, keep, best)
    return final


def begin(root: Path, step: int) -> Path:
    """A new directory beside the place of a checkpoint; what a process that was killed has left there is removed."""
    for stale in root.glob(".step-*.new"):
        shutil.rmtree(stale)
    beside = root / f".step-{step:08d}.new"
    beside.mkdir(parents=True)
    return beside


def complete(
    root: Path,
    step: int,
    written: Future[Any],
    model: PreTrainedModel,
    state: Mapping[str, Any],
    keep: int,
    best: int | None = None,
) -> Path:
    """Make a checkpoint of the shards that all processes are writing, as one of them: as `save` does, else.

    Args:
        root: where checkpoints are.
        step: of this one.
        written: ends when all shards are on the disk.
        model: whose settings stand beside them.
        state: all that is not in the shards.
        keep: so many of the newest stay.
        best: the step of one that stays, too.
    """
    final = root / f"step-{step:08d}"
    beside = root / f".{final.name}.new"
    with _whole_or_not(root, step, beside):
        written.result()
        model.config.save_pretrained(beside)
        _finish(beside, state, final)
    _drop(root, keep, best)
    return final


def wait_for(written: Future[Any], root: Path, step: int) -> None:
    """Wait for the shards, as one of the processes that leave the rest to another."""
    with _whole_or_not(root, step, None):
        written.result()


@contextmanager
def _whole_or_not(root: Path, step: int, beside: Path | None) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # torch and safetensors have classes of their own for what a disk refuses
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)
        if out_of_memory.is_memory(error):
            raise
        raise TrainingError(f"the checkpoint of step {step} cannot be written to {root}: {_reason(error)}") from error


def _drop(root: Path, keep: int, best: int | None) -> None:
    for old in _all(root)[:-keep]:
        if best is None or old.name != f"step-{best:08d}":
            shutil.rmtree(old, ignore_errors=True)  # the run has what it needs; tried again with the next one


def _finish(directory: Path, state: Mapping[str, Any], final: Path) -> None:
    """Add what is not there yet, see that all of it would survive a power cut, and move it to its place."""
    with (directory / "state.pt").open("wb") as file:  # a file of ours, whose errors are the system's
        torch.save(dict(state), file)
    checksums = {file.name: _digest(file) for file in sorted(directory.iterdir())}
    (directory / CHECKSUMS).write_text(json.dumps(checksums, indent=2))
    for file in (*directory.iterdir(), directory):
        to_disk(file)
    directory.rename(final)
    to_disk(final.parent)


def _reason(error: Exception) -> str:
    """What the system said, whoever passed it on."""
    known = next(
        (e for e in (error, error.__cause__, error.__context__) if isinstance(e, OSError) and e.strerror), None
    )
    return str(known.strerror) if known else " ".join(str(error).split())


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
        has_weights = any(name.endswith(".safetensors") for name in checksums)
        if not (has_weights and "state.pt" in checksums):
            return f"{CHECKSUMS} is not whole"
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
    """All of a checkpoint but the weights, on the CPU.

    Raises:
        TrainingError: there is more in it than tensors and plain values, which could run code when it is read.
    """
    try:
        return torch.load(directory / "state.pt", map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise TrainingError(
            f"{directory / 'state.pt'} is not read, since it holds more than tensors and plain values; it was not "
            "written by this code"
        ) from error


def _all(root: Path) -> list[Path]:
    return sorted(root.glob("step-*"))


def gather(source: Path, target: Path) -> None:
    """Make of a checkpoint in shards one with whole tensors.

    Raises:
        TrainingError: it is damaged, or cannot be written.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    from adafrugal.training.checkpoints import sharded

    logging.disable_progress_bar()
    if damage := _damage(source):
        raise TrainingError(f"the checkpoint {source} is damaged ({damage})")
    config = AutoConfig.from_pretrained(source)
    model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    sharded.read_model(source, model)
    state = sharded.whole(load_state(source), source)
    beside = target.with_name(f".{target.name}.new")
    try:
        beside.mkdir(parents=True)
        model.save_pretrained(beside)
        _finish(beside, state, target)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise TrainingError(f"{target} cannot be written: {_reason(error)}") from error
