"""A stand-in for torch.cuda on a machine without a GPU: tensors "on cuda" lie on the CPU.

It keeps the order of calls, and raises as torch does where a call comes before CUDA is initialised. What initialises
CUDA by itself in torch does so here. Compiled functions are the functions themselves.
"""

import contextlib
import types

import torch
from torch.overrides import TorchFunctionMode

LOOKS = ("is_available", "device_count", "is_initialized")  # that leave CUDA as it is


class StandIn:
    """What `installed` gives; `has_bf16`: whether the GPU has bf16 (an emulation there always is).

    `share` is that of the GPU's memory which torch's allocator may hold.
    """

    def __init__(self, has_bf16=True):
        self.has_bf16, self.calls, self.is_initialized, self.share = has_bf16, [], False, 1.0

    def forget(self):
        """Be a new process."""
        self.calls, self.is_initialized = [], False

    def opens_first(self):
        """Whether nothing but looks came before the explicit initialisation."""
        touching = [name for name in self.calls if name not in LOOKS]
        return touching[:1] == ["init"]

    def _hold(self, share, device):
        self.share = share

    def replacements(self):
        """Names of torch.cuda, and what stands for them."""
        properties = types.SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=80 * 2**30, major=9, minor=0)
        initialises = {
            "init": None, "set_device": None, "current_device": 0, "synchronize": None, "set_rng_state": None,
            "get_device_name": properties.name, "get_device_properties": properties,
            "is_bf16_supported": lambda including_emulation=True: self.has_bf16 or including_emulation,
            "get_rng_state": torch.zeros(16, dtype=torch.uint8), "mem_get_info": (79 * 2**30, 80 * 2**30),
            "is_current_stream_capturing": False, "get_per_process_memory_fraction": lambda device: self.share,
            "set_per_process_memory_fraction": self._hold,
        }  # fmt: skip
        looks = {
            "is_available": True, "device_count": 1, "is_initialized": lambda: self.is_initialized,
            # these give zeros before CUDA is initialised, and torch keeps a seed until then
            "memory_allocated": 2**20, "memory_reserved": 2**21, "max_memory_allocated": 2**20,
            "max_memory_reserved": 2**21, "empty_cache": None, "manual_seed_all": None,
        }  # fmt: skip
        found = {name: self._call(name, value, initialises=True) for name, value in initialises.items()}
        found |= {name: self._call(name, value) for name, value in looks.items()}
        for name in ("reset_peak_memory_stats", "reset_accumulated_memory_stats"):
            found[name] = self._call(name, self._refuse)
        return found | {"Event": lambda **_: types.SimpleNamespace(record=lambda *_: None, elapsed_time=lambda _: 1.0)}

    def _call(self, name, value, initialises=False):
        def call(*args, **kwargs):
            self.calls.append(name)
            self.is_initialized |= initialises
            return value(*args, **kwargs) if callable(value) else value

        return call

    def _refuse(self, device=""):
        if not self.is_initialized:
            raise RuntimeError(f"Invalid device argument {device}: did you call init?")


class _OnCpu(TorchFunctionMode):
    """Everything that is asked for on cuda is made on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.device:
            return func(*args, **kwargs)
        args = tuple(_cpu(arg) for arg in args)
        if "device" in kwargs:
            kwargs["device"] = _cpu(kwargs["device"])
        return func(*args, **kwargs)


def _cpu(given):
    is_cuda = isinstance(given, str | torch.device) and str(given).startswith("cuda")
    return torch.device("cpu") if is_cuda else given


@contextlib.contextmanager
def installed(monkeypatch, has_bf16=True):
    """Put a stand-in in the place of torch.cuda."""
    stand_in = StandIn(has_bf16)
    for name, replacement in stand_in.replacements().items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    with _OnCpu():
        yield stand_in
