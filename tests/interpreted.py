"""The kernel of `one_pass` where there is no GPU, and its launches."""

import pytest
import torch

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
    from adafrugal.optim.kernels import one_pass

    monkeypatch.setattr(one_pass, "BLOCK", 256)
    monkeypatch.setattr(one_pass, "RUN", 2)
    monkeypatch.setattr(tables, "work_on", lambda device: device.type == "cpu")


@pytest.fixture
def launches(kernel, monkeypatch):
    """The arguments of each launch, which does nothing."""
    from adafrugal.optim.kernels import one_pass

    made = []

    class Stub:
        def __getitem__(self, grid):
            return lambda *given, **options: made.append((grid, given, options))

    monkeypatch.setattr(one_pass, "step", Stub())
    return made
