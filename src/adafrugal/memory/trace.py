"""A training step on tensors that have shapes and no storage: what it would take, before anything is allocated.

The step is the run's own code, under torch's FakeTensorMode. The kernels are those of a CPU, whatever the run's device.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adafrugal.optim import state_bytes


@dataclass(frozen=True)
class Footprint:
    """Bytes in use at the moment of a step at which they are most.

    Args:
        weights, gradients, state: of the model and its optimizer.
        activations: what the blocks have kept for the backward pass.
        temporaries: all else: logits, what the loss makes of them, and what single operations need.
        phase: forward, backward or optimizer.
    """

    weights: int
    gradients: int
    state: int
    activations: int
    temporaries: int
    phase: str

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.state + self.activations + self.temporaries


_SMALL = 2**20  # numbers; a permutation of so many is no memory to speak of
_ANSWERS: dict[Callable[..., Any], Callable[[Tensor], Any]] = {
    Tensor.__bool__: lambda _: True,
    Tensor.__float__: lambda _: 1.0,
    Tensor.item: lambda given: 1.0 if given.is_floating_point() else 0,
    Tensor.__int__: lambda _: 0,
    Tensor.nonzero: lambda mask: torch.arange(mask.numel()).unsqueeze(1),
    torch.equal: lambda _: False,
}


class Answers(TorchFunctionMode):
    """A tensor without storage has no values: each is true, and 1; no two are equal. What is drawn is drawn.

    A part of `shadows`; hooks of the backward pass, where torch leaves such modes, enter it themselves.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _ANSWERS and isinstance(args[0], FakeTensor):
            return _ANSWERS[func](args[0])
        if func in _ANSWERS or _draws_few(func, args):
            with unset_fake_temporarily():
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _draws_few(func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether something is chosen, and not noise of a weight's size made."""
    return (func is torch.randperm and args[0] < _SMALL) or (func is torch.randint and math.prod(args[1]) == 1)


@contextmanager
def shadows() -> Iterator[None]:
    """Within it, tensors that are made have shapes and no storage; what is to be warned of, the run itself will say."""
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True), Answers():
        warnings.simplefilter("ignore")
        yield


class _Live(TorchDispatchMode):
    """Adds up the storages that are alive, and notes the moment at which they are most.

    Attributes:
        now: bytes alive.
        phase: of the step, as somebody says.
        peak: the moment at which they were most.
        kept: bytes alive where the head last began.
    """

    def __init__(self, model: torch.nn.Module, optimizer: Optimizer) -> None:
        super().__init__()
        self._model, self._optimizer = model, optimizer
        self.now, self.phase, self.kept = 0, "", 0
        self._counted: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self.weights = sum(self._count(tensor) for tensor in (*model.parameters(), *model.buffers()))
        for state in optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    self._count(value)
        self.peak = Footprint(self.weights, 0, self.now - self.weights, 0, 0, "")

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        if self.now > self.peak.total:
            self._note()
        return found

    def _count(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        if storage in self._counted:
            return 0
        self._counted.add(storage)
        size = storage.nbytes()
        self.now += size
        weakref.finalize(storage, self._forget, size)
        return size

    def _forget(self, size: int) -> None:
        self.now -= size

    def _note(self) -> None:
        grads = {id(g.untyped_storage()): g for p in self._model.parameters() if (g := p.grad) is not None}
        gradients = sum(grad.untyped_storage().nbytes() for grad in grads.values())
        state = state_bytes(self._optimizer).total
        rest = self.now - self.weights - gradients - state
        kept = 0 if self.phase == "optimizer" else min(rest, max(0, self.kept - self.weights - gradients - state))
        self.peak = Footprint(self.weights, gradients, state, kept, rest - kept, self.phase)


def footprint(
    model: torch.nn.Module,
    optimizer: Optimizer,
    loss: Callable[[], Tensor],
    passes: int,
    clip_norm: float | None,
    steps: int,
) -> tuple[Footprint, int]:
    """Trace some steps. An optimizer's first one chooses subspaces and makes the state.

    Args:
        model: made within `shadows`, with its output layer as `lm_head`.
        optimizer: of its parameters.
        loss: the forward pass over one micro-batch.
        passes: micro-batches in a step; more than two take no more than two.
        clip_norm: of the gradients; None where they are not clipped.
        steps: that are made.

    Returns:
        The peak, and the bytes of the state after the first of the steps.
    """
    live, first_state = _Live(model, optimizer), 0

    def head_begins(*_: Any) -> None:
        if live.phase == "forward":  # chunks of the loss are made again in the backward pass
            live.kept = live.now

    seen = model.lm_head.register_forward_pre_hook(head_begins)
    with live:
        for _ in range(steps):
            for _ in range(min(passes, 2)):
                live.phase = "forward"
                value = loss()
                live.phase = "backward"
                value.backward()
            if clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
            live.phase = "optimizer"
            optimizer.step()
            first_state = first_state or state_bytes(optimizer).total
            optimizer.zero_grad(set_to_none=True)
    seen.remove()
    return live.peak, first_state
