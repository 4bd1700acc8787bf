"""Settings that lower memory, in the order of what they cost, and what each saves by the estimate."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from adafrugal.memory import card
from adafrugal.memory.estimate import estimate, shared
from adafrugal.memory.on_device import chunk_rows, micro_batch, rows_at_once
from adafrugal.memory.trace import Footprint
from adafrugal.settings.compose import refuse_impossible
from adafrugal.settings.schema import Settings
from adafrugal.system.errors import SettingError

CHUNK = 256  # rows of logits made at once
DENSITY = 0.05  # the end of AdaFRUGAL's ρ in the paper
_Values = dict[str, Any]  # dotted name -> value
_Fits = Callable[[Footprint], bool] | None  # None: there is no time to estimate


@dataclass(frozen=True)
class Cut:
    """Settings that lower the peak, beside those before them."""

    words: str  # as one types them
    settings: Settings  # with all cuts so far
    before: Footprint
    after: Footprint | None  # None: not estimated, for want of time


def foretold(settings: Settings) -> Footprint:
    """The peak of a run by the estimate."""
    return estimate(settings).peak


def takes(peak: Footprint, is_gpu: bool) -> int:
    """Bytes of a peak of tensors, on a GPU with what torch's allocator keeps beyond them."""
    return card.held(peak) if is_gpu else peak.total


def cuts(
    settings: Settings,
    room: int = 0,
    is_gpu: bool = True,
    seconds: float = 60,
    peak_of: Callable[[Settings], Footprint] = foretold,
) -> Iterator[Cut]:
    """Yield what lowers the peak, each beside those before, until it fits: first what leaves the run as it is.

    What saves less than a hundredth is left out, as is what the other settings do not allow. At most a dozen estimates
    are made, and none begins after so many seconds: what is left comes without.

    Args:
        settings: of a run.
        room: bytes that there are for tensors and what an allocator keeps; 0 yields all that lowers the peak.
        is_gpu: whether they are a GPU's.
        seconds: for the estimates.
        peak_of: the estimate.

    Raises:
        SettingError: such a run is not estimated.
    """

    def fits(peak: Footprint) -> bool:
        return takes(peak, is_gpu) <= room

    begun, peak = time.monotonic(), peak_of(settings)
    elsewhere = (_state_elsewhere,) if is_gpu else ()
    order = (_chunks, _checkpoints, _one_by_one, *elsewhere, _small_state, _fewer_entries, _small_weights)
    for choose in (*order, *order):  # what saves nothing beside large gradients may do so without them
        is_late = time.monotonic() - begun > seconds
        values = choose(settings, peak, None if is_late else fits)
        changed = _with(settings, values)
        if not values or changed is None:
            continue
        after = None if is_late else peak_of(changed)
        if after is not None and after.total > 0.99 * peak.total:
            continue
        yield Cut(" ".join(f"{name}={_typed(value)}" for name, value in values.items()), changed, peak, after)
        if after is not None and fits(after):
            return
        settings, peak = changed, after or peak


def _chunks(settings: Settings, peak: Footprint, fits: _Fits) -> _Values:
    trainer = settings.trainer
    rows = rows_at_once(trainer, shared(trainer)) * trainer.sequence_length
    is_able = hasattr(settings.model, "loss_chunk_rows") and settings.task.kind == "pretrain"
    return {"model.loss_chunk_rows": CHUNK} if is_able and (chunk_rows(settings) or rows) > CHUNK else {}


def _checkpoints(settings: Settings, peak: Footprint, fits: _Fits) -> _Values:
    is_done = settings.trainer.activation_checkpointing == "layers"
    return {} if is_done else {"trainer.activation_checkpointing": "layers"}


def _one_by_one(settings: Settings, peak: Footprint, fits: _Fits) -> _Values:
    """One gradient at a time, or fewer rows at a time, by which is the larger part: they exclude each other."""
    trainer = settings.trainer
    in_backward: _Values = {"trainer.update_in_backward": True}
    if trainer.update_in_backward:
        return {}
    rows = rows_at_once(trainer, shared(trainer))
    is_of_gradients = peak.gradients > peak.activations + peak.temporaries or rows == 1
    if is_of_gradients and _with(settings, in_backward) is not None:
        return in_backward
    fewer = 1 if rows == 1 or fits is None else micro_batch(settings, None, fits, shared(trainer))
    return {"trainer.micro_batch_size": fewer} if fewer < rows else {}


def _state_elsewhere(settings: Settings, peak: Footprint, fits: _Fits) -> _Values:
    has_it = getattr(settings.optimizer, "state_on", "") == "device"
    return {"optimizer.state_on": "cpu_always_full"} if has_it else {}


def _small_state(settings: Settings, peak: Footprint, fits: _Fits) -> _Values:
    is_large = getattr(settings.optimizer, "state_dtype", "int8") != "int8"
    return {"optimizer.state_dtype": "int8"} if is_large else {}


def _fewer_entries(settings: Settings, peak: Footprint, fits: _Fits) -> _Values:
    density = getattr(settings.optimizer, "density", None)
    if not isinstance(density, dict):
        return {}
    key = next((key for key in ("start", "value") if key in density), "")
    if not key or density[key] <= DENSITY:
        return {}
    return {"optimizer.density" if key == "value" else "optimizer.density.start": DENSITY}


def _small_weights(settings: Settings, peak: Footprint, fits: _Fits) -> _Values:
    if getattr(settings.model, "dtype", "bfloat16") == "bfloat16":
        return {}
    rounded = {"optimizer.stochastic_rounding": True} if hasattr(settings.optimizer, "stochastic_rounding") else {}
    return {"model.dtype": "bfloat16", "trainer.precision": "bf16"} | rounded


def _with(settings: Settings, values: _Values) -> Settings | None:
    """The settings with other values; None where they do not go together."""
    changed = copy.deepcopy(settings)
    for name, value in values.items():
        *path, last = name.split(".")
        part: Any = changed
        for step in path:
            part = getattr(part, step)
        if isinstance(part, dict):
            part[last] = value
        else:
            setattr(part, last, {"kind": "constant", "value": value} if name == "optimizer.density" else value)
    try:
        refuse_impossible(changed)
    except SettingError:
        return None
    return changed


def _typed(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
