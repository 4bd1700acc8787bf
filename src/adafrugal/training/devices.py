"""Where a run computes, and in which precision."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from adafrugal.config import SettingError, TrainerSettings


@dataclass(frozen=True)
class Place:
    """A device and the type that matrix products are made in; weights and state are float32 in either case."""

    device: torch.device
    precision: str

    def autocast(self) -> AbstractContextManager[None]:
        """The context in which forward passes run."""
        dtype = torch.float16 if self.precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype, enabled=self.precision != "fp32")

    def random_state(self) -> dict[str, torch.Tensor]:
        """Of the global generators, from which dropout draws."""
        gpu = {"cuda": torch.cuda.get_rng_state(self.device)} if self.device.type == "cuda" else {}
        return {"cpu": torch.get_rng_state(), **gpu}

    def set_random_state(self, state: dict[str, torch.Tensor]) -> None:
        """Go on where `random_state` was taken; on another kind of device the numbers are others anyway."""
        torch.set_rng_state(state["cpu"])
        if self.device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.device)

    def name(self) -> str:
        """The device as its maker calls it."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type


def place(settings: TrainerSettings, begun_in: str | None = None, number: int = 0) -> Place:
    """The device and precision that are asked for, or the best there are.

    Args:
        settings: `auto` is the GPU where there is one, and bf16 on a GPU that has it.
        begun_in: the precision that the run began in; `auto` keeps to it, so that a run has one precision wherever
            it goes on.
        number: of the GPU among those of the machine, where several processes have one each.

    Raises:
        SettingError: no such device.
    """
    has_gpu = torch.cuda.is_available()
    if settings.device == "cuda" and not has_gpu:
        raise SettingError("trainer.device is cuda, but torch finds no GPU; allowed here: auto, cpu")
    there = torch.cuda.device_count()
    if has_gpu and settings.device != "cpu" and number >= there:
        allowed = "as many processes on a machine as it has (torchrun --nproc_per_node), or trainer.device=cpu"
        raise SettingError(f"LOCAL_RANK is {number}, and torch finds GPUs 0 to {there - 1}; allowed: {allowed}")
    device = torch.device("cuda", number) if has_gpu and settings.device != "cpu" else torch.device("cpu")
    precision = settings.precision
    if precision == "auto":
        best = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
        precision = begun_in or best
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what is left in float32
    return Place(device, precision)
