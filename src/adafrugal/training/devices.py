"""The device of a run, and its precision."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

from adafrugal.memory import card
from adafrugal.settings.schema import TrainerSettings
from adafrugal.system.errors import SettingError, first_line
from adafrugal.training.distributed import ranks


@dataclass(frozen=True)
class Place:
    """An opened device, and the precision of matrix products. Weights and state have the types of the settings."""

    device: torch.device
    precision: str
    limit: float | None = None  # GiB that the run is held to, of a GPU

    def autocast(self) -> AbstractContextManager[None]:
        """The context in which forward passes run."""
        dtype = torch.float16 if self.precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype, enabled=self.precision != "fp32")

    def random_state(self) -> dict[str, torch.Tensor]:
        """State of the global generators, from which dropout draws."""
        gpu = {"cuda": torch.cuda.get_rng_state(self.device)} if self.is_gpu else {}
        return {"cpu": torch.get_rng_state(), **gpu}

    def set_random_state(self, state: dict[str, torch.Tensor]) -> None:
        """Continue from `random_state`; on another kind of device the draws differ anyway."""
        torch.set_rng_state(state["cpu"])
        if self.is_gpu and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.device)

    def name(self) -> str:
        """The maker's name of the device."""
        return torch.cuda.get_device_name(self.device) if self.is_gpu else self.device.type

    def memory(self) -> int | None:
        """Bytes of the GPU's memory, used or not, or those of the limit; None on a CPU."""
        if not self.is_gpu:
            return None
        there = torch.cuda.get_device_properties(self.device).total_memory
        return there if self.limit is None else min(there, int(self.limit * card.GIB))

    def free(self) -> int:
        """Bytes of the GPU's memory that are not in use, within the limit; 0 on a CPU."""
        if not self.is_gpu:
            return 0
        gc.collect()
        torch.cuda.empty_cache()  # torch keeps the memory of an earlier run of this process
        free = torch.cuda.mem_get_info(self.device)[0]
        if self.limit is None:
            return free
        return max(0, min(free, card.within_limit(self.limit) - torch.cuda.memory_reserved(self.device)))

    @property
    def is_gpu(self) -> bool:
        """Whether it is a CUDA device."""
        return self.device.type == "cuda"


def open_device(settings: TrainerSettings, number: int = 0, warn: Callable[[str], None] | None = None) -> Place:
    """Open the device of the settings, or the best there is.

    Call it before all else that touches CUDA: several of torch's functions fail before CUDA is initialised.

    `device=auto` is the GPU where there is one, of this `number` where several processes have one each;
    `precision=auto` is bf16 on a GPU that has it, else fp32. `warn` prints why an existing GPU is not used, and that a
    CPU is slow in bf16.

    Raises:
        SettingError: the device is missing, or torch cannot use it; or a CPU has a limit that is a GPU's.
    """
    device = torch.device("cpu")
    if settings.device != "cpu":
        reason = _open_gpu(number)
        if reason is None:
            device = torch.device("cuda", number)
        elif settings.device == "cuda":
            raise SettingError(f"trainer.device is cuda, but {reason}; allowed here: auto, cpu")
        elif warn is not None and reason != _NO_GPU:
            warn(f"the run is made on the CPU: {reason}")
    _hold(device, settings.memory_limit_gib)
    precision = settings.precision
    if precision == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if has_bf16 else "fp32"
    if precision == "bf16" and device.type == "cpu" and warn is not None and not _computes_bf16():
        warn("this CPU has no instructions for bf16; such a one took nine times as long as with trainer.precision=fp32")
    return Place(device, precision, settings.memory_limit_gib)


def _hold(device: torch.device, gib: float | None) -> None:
    """Hold this process to so many GiB of a GPU, CUDA's context included; None lifts the limit of an earlier run."""
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
        share = 1.0 if gib is None else min(1.0, card.within_limit(gib) / there)
        if share != torch.cuda.get_per_process_memory_fraction(device):
            torch.cuda.set_per_process_memory_fraction(share, device)
    elif gib is not None:
        held = f"trainer.memory_limit_gib is {gib:g}, which holds a run on a GPU to so much, and this one is on a CPU"
        raise SettingError(f"{held}; allowed here: null (`ulimit -v` limits a process)")


def _computes_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this CPU multiplies in bfloat16, or nothing is known about it; else oneDNN converts all operands."""
    try:
        words = set(cpuinfo.read_text().split())
    except OSError:
        return True
    return not words & {"flags", "Features"} or bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


_NO_GPU = "torch finds no GPU"


def _open_gpu(number: int) -> str | None:
    """Initialise CUDA and select a GPU; return the reason if torch cannot use any here.

    Raises:
        SettingError: there is no GPU of this number, or it is in use; or one of several processes cannot use it.
    """
    if not torch.cuda.is_available():
        return _why_unavailable()
    there = torch.cuda.device_count()
    if number >= there:
        allowed = "as many processes on a machine as it has (torchrun --nproc_per_node), or trainer.device=cpu"
        raise SettingError(f"LOCAL_RANK is {number}, and torch finds GPUs 0 to {there - 1}; allowed: {allowed}")
    device = torch.device("cuda", number)
    try:
        torch.cuda.init()
        torch.cuda.set_device(device)
        torch.ones(1, device=device).add_(1)
        torch.cuda.synchronize(device)
    except (RuntimeError, torch.cuda.DeferredCudaCallError) as error:
        name = torch.cuda.get_device_name(device) if torch.cuda.is_initialized() else "the GPU"
        if any(words in str(error) for words in ("out of memory", "busy or unavailable")) or not ranks.is_alone():
            raise SettingError(
                f"{name} cannot be used now ({first_line(error)}); free it, choose another with CUDA_VISIBLE_DEVICES, "
                "or set trainer.device=cpu"
            ) from error
        return f"torch {torch.__version__} cannot use {name} ({first_line(error)})"
    torch.set_float32_matmul_precision("high")  # TF32 for products that stay in float32
    return None


def _why_unavailable() -> str:
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if hidden or not any(Path("/dev").glob("nvidia[0-9]*")):
        return _NO_GPU
    if torch.version.cuda is None:
        return f"this machine has an NVIDIA GPU, and torch {torch.__version__} is a build without CUDA: install another"
    try:
        torch.cuda.init()
    except RuntimeError as error:
        return f"this machine has an NVIDIA GPU that torch {torch.__version__} cannot use ({first_line(error)})"
    return _NO_GPU
