"""Trace training steps on fake tensors, which have shapes and no storage, and count the bytes they would take.

The steps are the run's own code under torch's FakeTensorMode, with a CPU's kernels whatever the run's device. Forward
and backward passes do not depend on the optimizer: they are traced once and repeated for each.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from adafrugal.optim import state_bytes
from adafrugal.optim.updates import few_slices
from adafrugal.settings.schema import TrainerSettings


@dataclass(frozen=True)
class Footprint:
    """Bytes in use at the peak of a step."""

    weights: int
    gradients: int
    state: int  # of the optimizer
    activations: int  # kept by the blocks for the backward pass
    temporaries: int  # all else: logits and their gradients, the working memory of single operations
    phase: str  # of the peak: forward, backward, optimizer or evaluation

    @property
    def total(self) -> int:
        """The sum."""
        return self.weights + self.gradients + self.state + self.activations + self.temporaries


_ANSWERS: dict[Callable[..., Any], Callable[[Tensor], Any]] = {
    Tensor.__bool__: lambda _: True,
    Tensor.__float__: lambda _: 1.0,
    Tensor.item: lambda given: 1.0 if given.is_floating_point() else 0,
    Tensor.__int__: lambda _: 0,
    Tensor.nonzero: lambda mask: torch.arange(mask.numel()).unsqueeze(1),
    torch.equal: lambda _: False,
    torch.allclose: lambda _: True,
}


class Answers(TorchFunctionMode):
    """Give fake tensors values: bool() is True, float item() 1.0, torch.equal False; small random draws are real.

    `shadows` enters it. Torch leaves such modes in the backward pass, so that hooks there enter it again.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _ANSWERS and isinstance(args[0], FakeTensor):
            return _ANSWERS[func](args[0])
        # choices of lines or blocks; not noise of a weight's size
        draws = (func is torch.randperm and args[0] < 2**20) or (func is torch.randint and math.prod(args[1]) == 1)
        if func in _ANSWERS or draws:
            with unset_fake_temporarily():
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextmanager
def shadows() -> Iterator[None]:
    """Make all new tensors fake, update few slices of each, and show no warnings: the run itself will."""
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True), Answers(), few_slices():
        warnings.simplefilter("ignore")
        yield


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the tensors with storage that one is made of: a moment in 8 bits of codes and scales, a shard of itself."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _parts(getattr(tensor, name))


class Live(TorchDispatchMode):
    """Add up live storages: `now`, and `kept` when the output layer begins; `peak` is the largest footprint."""

    def __init__(self, model: torch.nn.Module, optimizer: Optimizer | None) -> None:
        super().__init__()
        self._model, self._optimizer = model, optimizer
        self.now, self.phase, self.kept = 0, "", 0
        self._counted: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self._count((*model.parameters(), *model.buffers()))
        self._weights = self.now
        if optimizer is not None:
            self._count(value for state in optimizer.state.values() for value in state.values())
        self.peak = Footprint(self._weights, 0, self.now - self._weights, 0, 0, "")

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        self._count(tree_leaves(found))
        if self.now > self.peak.total:
            self.peak = self._footprint()
        return found

    def repeat(self, passes: Footprint) -> None:
        """Count the peak of `passes` once more, beside the state and what else is in use now."""
        beside, state = self.now - self._weights, self._state()
        found = replace(passes, state=state, temporaries=passes.temporaries + beside - state)
        self.peak = max(self.peak, found, key=lambda peak: peak.total)

    def _count(self, values: Iterable[Any]) -> None:
        for value in values:
            for part in _parts(value) if isinstance(value, Tensor) else ():
                if (storage := part.untyped_storage()) not in self._counted:
                    self._counted.add(storage)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._forget, storage.nbytes())

    def _forget(self, size: int) -> None:
        self.now -= size

    def _state(self) -> int:
        return 0 if self._optimizer is None else state_bytes(self._optimizer).total

    def _footprint(self) -> Footprint:
        gradients = sum(p.grad.untyped_storage().nbytes() for p in self._model.parameters() if p.grad is not None)
        state = self._state()
        known = self._weights + gradients + state
        rest = self.now - known
        keeps = self.phase in ("forward", "backward")
        activations = min(rest, max(0, self.kept - known)) if keeps else 0
        return Footprint(self._weights, gradients, state, activations, rest - activations, self.phase)


def give_gradients(model: torch.nn.Module) -> None:
    """Give each parameter that is trained a gradient."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None


Passes = Callable[[Live], Tensor]  # make a step's gradients, and return the loss


def traced(
    model: torch.nn.Module, heads: Sequence[torch.nn.Module], loss: Callable[[], Tensor], trainer: TrainerSettings
) -> Passes:
    """Return the passes of a step as they are, each time.

    Args:
        model: made within `shadows`.
        heads: its parts that begin where the last block ends.
        loss: the forward pass over one micro-batch, to a scalar.
        trainer: batch, micro-batch and clipping. At most two micro-batches are traced: more have the same peak.
    """
    count = min(trainer.batch_size // (trainer.micro_batch_size or trainer.batch_size), 2)

    def passes(live: Live) -> Tensor:
        def head_begins(*_: Any) -> None:
            if live.phase == "forward":  # chunks of the loss are recomputed in the backward pass
                live.kept = live.now

        seen = [head.register_forward_pre_hook(head_begins) for head in heads]
        for _ in range(count):
            live.phase = "forward"
            value = loss()
            live.phase = "backward"
            value.backward()
        for hook in seen:
            hook.remove()
        if trainer.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.clip_norm)
        return value

    return passes


def repeated(model: torch.nn.Module, known: Footprint) -> Passes:
    """Return passes of which only the peak is counted, since they were traced before; the gradients are made."""

    def passes(live: Live) -> Tensor:
        live.repeat(known)
        live.phase = "backward"
        give_gradients(model)
        return torch.zeros(())

    return passes


def evaluation(model: torch.nn.Module, loss: Callable[[], Tensor]) -> Footprint:
    """Trace the evaluation of one batch, without an optimizer; return its peak.

    Args:
        model: made within `shadows`, in training mode.
        loss: the forward pass over a micro-batch, to a scalar.
    """
    live = Live(model, None)
    live.phase = "evaluation"
    model.eval()
    with torch.no_grad(), live:
        loss()
    model.train()
    return live.peak


def footprint(model: torch.nn.Module, optimizer: Optimizer | None, passes: Passes, steps: int) -> Footprint:
    """Trace some steps; return their peak. An optimizer's first step chooses subspaces and makes the state.

    Args:
        model: made within `shadows`.
        optimizer: of its parameters; None: the steps are the passes alone.
        passes: of each step.
        steps: how many.
    """
    live = Live(model, optimizer)
    with live:
        for _ in range(steps):
            value = passes(live)
            live.phase = "optimizer"
            if optimizer is not None:
                optimizer.step()
            model.zero_grad(set_to_none=True)
        del value
    return live.peak
