"""A checkpoint: the model as transformers reads it, and beside it everything else as tensors and numbers.

checkpoints/step-00000100/
model.safetensors, config.json   for `from_pretrained`, and a tokenizer's files where the task has one; LoRA's names are
                                 those of peft's `inject_adapter_in_model`
state.pt                         optimizer, schedule, random state, progress; loads with weights_only=True
checksums.json                   SHA-256 of each of these files, to detect damage

If each process holds a part of the model, each writes its tensors to a shard-*.safetensors instead (`sharded`), and
`python -m adafrugal.training` converts them to the form above.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from adafrugal.memory import out_of_memory
from adafrugal.system.errors import TrainingError, chain, line
from adafrugal.system.files import to_disk

CHECKSUMS = "checksums.json"


def name(step: int) -> str:
    """The directory of a step's checkpoint."""
    return f"step-{step:08d}"


def begin(root: Path, step: int) -> Path:
    """Make a scratch directory for a checkpoint; remove those that killed processes left."""
    for stale in root.glob(".step-*.new"):
        shutil.rmtree(stale)
    beside = root / f".{name(step)}.new"
    beside.mkdir(parents=True)
    return beside


def save(
    root: Path, step: int, fill: Callable[[], Path], state: Mapping[str, Any], keep: int, best: int | None = None
) -> Path:
    """Write a checkpoint to a scratch directory, move it to its place, and remove those that need not be kept.

    Args:
        root: where checkpoints are.
        step: of this one.
        fill: writes the model into the directory of `begin`, and returns that directory.
        state: everything else.
        keep: the number of newest checkpoints that stay.
        best: the step of a checkpoint that stays, too.

    Raises:
        TrainingError: it cannot be written; it is removed, and those before it stay.
        RuntimeError, MemoryError: memory was refused; likewise.
    """
    final = root / name(step)
    with writing(root, step):
        try:
            _finish(fill(), state, final)
        except Exception:
            shutil.rmtree(root / f".{name(step)}.new", ignore_errors=True)
            raise
    for old in _all(root)[:-keep]:
        if best is None or old.name != name(best):
            shutil.rmtree(old, ignore_errors=True)  # the run does not need it; the next save tries again
    return final


@contextmanager
def writing(root: Path, step: int) -> Iterator[None]:
    """Explain an error in writing a checkpoint; a refused allocation stays as it is."""
    try:
        yield
    except Exception as error:  # torch and safetensors have their own classes for disk errors
        if out_of_memory.is_memory(error):
            raise
        raise TrainingError(f"the checkpoint of step {step} cannot be written to {root}: {_reason(error)}") from error


def _finish(directory: Path, state: Mapping[str, Any], final: Path) -> None:
    """Add state and checksums, flush all files to disk, and move the directory to its place."""
    with (directory / "state.pt").open("wb") as file:  # opened here, so that its errors are OSErrors
        torch.save(dict(state), file)
    checksums = {file.name: _digest(file) for file in sorted(directory.iterdir())}
    (directory / CHECKSUMS).write_text(json.dumps(checksums, indent=2))
    for file in (*directory.iterdir(), directory):
        to_disk(file)
    directory.rename(final)
    to_disk(final.parent)


def _reason(error: Exception) -> str:
    """The system's message, whichever library passed it on; without one, the error's own."""
    return next((str(e.strerror) for e in chain(error) if isinstance(e, OSError) and e.strerror), line(error))


def latest(root: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint; None where there is none at all.

    Newer, damaged ones are renamed, so that they do not count towards `keep`.

    Args:
        root: where they are.
        warn: prints a sentence about each damaged one.

    Raises:
        TrainingError: all of them are damaged. Only the user may decide to begin anew.
    """
    found, damaged = _all(root), []
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
    """The damage to a checkpoint's files; None if they are unchanged."""
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
    """Load a checkpoint's state.pt, on the CPU.

    Raises:
        TrainingError: it holds more than tensors and plain values, which could run code when it is read.
    """
    try:
        return torch.load(directory / "state.pt", map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise TrainingError(
            f"{directory / 'state.pt'} is not read, since it holds more than tensors and plain values; it was not "
            "written by this code"
        ) from error


def of_another_version(detail: object) -> TrainingError:
    """The error for a checkpoint that another version of this code wrote; `detail` is the difference."""
    return TrainingError(
        f"the checkpoint was written by another version of this code ({detail}): continue with that version, or "
        "remove the run's directory to begin anew"
    )


def _all(root: Path) -> list[Path]:
    return sorted(root.glob("step-*"))


def gather(source: Path, target: Path) -> None:
    """Convert a sharded checkpoint to whole tensors.

    Raises:
        TrainingError: the source is damaged, or the target cannot be written.
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
