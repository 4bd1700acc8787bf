"""The kernel of `one_pass` where there is no GPU, and its launches."""

import pytest
import torch

from adafrugal.optim import eight_bits, storage
from adafrugal.optim.kernels import tables


@pytest.fixture
def kernel(request, monkeypatch):
    """Where there is no GPU, run the kernel in Triton's interpreter, and let tables take tensors on the CPU."""
    pytest.importorskip("triton", reason="triton is not installed")
    if request.node.get_closest_marker("gpu"):
        return
    if torch.cuda.is_available():
        pytest.skip("the kernel is compiled here; `-m gpu` runs it")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    if not isinstance(tl.max, InterpretedFunction):  # triton was imported before, for which the variable decides
        monkeypatch.setattr(tl, "max", InterpretedFunction(tl.max.fn))
    from adafrugal.optim.kernels import one_pass

    monkeypatch.setattr(one_pass, "BLOCK", 256)
    monkeypatch.setattr(one_pass, "RUN", 2)
    monkeypatch.setattr(tables, "work_on", lambda device: device.type == "cpu")


@pytest.fixture
def codes(request, kernel, monkeypatch):
    """Small matrices may have moments in 8 bits; tiles are large in the interpreter, which takes long for each."""
    for name in ("_FEWEST", "_SHORTEST"):
        monkeypatch.setattr(storage, name, 1)
    if not request.node.get_closest_marker("gpu"):
        from adafrugal.optim.kernels import one_pass

        monkeypatch.setattr(one_pass, "BLOCK", 8 * eight_bits.BLOCK)


@pytest.fixture
def launches(kernel, monkeypatch):
    """The arguments of each launch, which does nothing."""
    from adafrugal.optim.kernels import one_pass

    made = []

    class Stub:
        def __getitem__(self, grid):
            return lambda *given, **options: made.append((grid, given, options))

    monkeypatch.setattr(one_pass, "step", Stub())
    monkeypatch.setattr(one_pass, "step_codes", Stub())
    return made
