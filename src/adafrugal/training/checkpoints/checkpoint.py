"""A checkpoint: the model as transformers reads it, and beside it everything else as tensors and numbers.

checkpoints/step-00000100/
model.safetensors, config.json   for `from_pretrained`; LoRA's names are those of peft's `inject_adapter_in_model`
tokenizer.json, …                the tokenizer, for `AutoTokenizer`
README.md                        the model card (`model_card`)
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
from collections.abc import Callable, Mapping
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


def scratch(final: Path) -> Path:
    """Where a checkpoint is written before it is moved to its place."""
    return final.with_name(f".{final.name}.new")


def begin(final: Path) -> Path:
    """Make a checkpoint's scratch directory; remove those that killed processes left."""
    for stale in final.parent.glob(".step-*.new"):
        shutil.rmtree(stale)
    scratch(final).mkdir(parents=True)
    return scratch(final)


def save(final: Path, fill: Callable[[], None], state: Mapping[str, Any] | None) -> None:
    """Write a checkpoint to its scratch directory, flush it to disk, and move it to its place.

    Args:
        final: its directory.
        fill: writes the model into the scratch directory.
        state: everything else; None on processes that write no more than their shards.

    Raises:
        TrainingError: it cannot be written; it is removed.
        RuntimeError, MemoryError: memory was refused; likewise.
    """
    directory = scratch(final)
    try:
        fill()
        if state is None:
            return
        with (directory / "state.pt").open("wb") as file:  # opened here, so that its errors are OSErrors
            torch.save(dict(state), file)
        checksums = {file.name: _digest(file) for file in sorted(directory.iterdir())}
        (directory / CHECKSUMS).write_text(json.dumps(checksums, indent=2))
        for file in (*directory.iterdir(), directory):
            to_disk(file)
        directory.rename(final)
        to_disk(final.parent)
    except Exception as error:  # torch and safetensors have their own classes for disk errors
        if state is not None:
            shutil.rmtree(directory, ignore_errors=True)
        if out_of_memory.is_memory(error):
            raise
        # the system's message, whichever library passed it on
        reason = next((e.strerror for e in chain(error) if isinstance(e, OSError) and e.strerror), line(error))
        raise TrainingError(f"the checkpoint {final.name} cannot be written to {final.parent}: {reason}") from error


def _all(root: Path) -> list[Path]:
    return sorted(root.glob("step-*"))


def prune(root: Path, keep: int, best: int | None = None) -> None:
    """Remove all checkpoints but the newest, `keep` of them, and that of the step `best`."""
    for old in _all(root)[:-keep]:
        if best is None or old.name != name(best):
            shutil.rmtree(old, ignore_errors=True)  # the run does not need it; the next call tries again


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
        if (why := damage(directory)) is None:
            for other in damaged:
                aside = root / f".{other.name}.damaged"
                shutil.rmtree(aside, ignore_errors=True)
                other.rename(aside)
            return directory
        warn(f"the checkpoint {directory.name} is damaged ({why}) and not used")
        damaged.append(directory)
    if found:
        raise TrainingError(
            f"none of the {len(found)} checkpoints in {root} can be read; remove the run's directory to begin anew"
        )
    return None


def damage(directory: Path) -> str | None:
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
        "begin anew: remove the run's directory, or leave trainer.continue_from out"
    )
