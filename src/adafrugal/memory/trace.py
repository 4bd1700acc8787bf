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
from typing import Any, Self
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from adafrugal.memory.on_device import rows_at_once
from adafrugal.optim import state_bytes
from adafrugal.optim.updates import few_slices
from adafrugal.settings.schema import Settings


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
    Tensor.tolist: lambda given: torch.ones(given.shape, dtype=given.dtype).tolist(),
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
    for part in (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]):
        if isinstance(part, Tensor):
            yield from _parts(part)


def _copied(func: Callable[..., Any], args: tuple[Any, ...]) -> int:
    """Return the bytes of the copy that gloo makes in a collective that gathers or scatters: of the larger side."""
    name = getattr(func, "__qualname__", str(func))
    if not (str(func).startswith("c10d.") and ("gather" in name or "scatter" in name)):
        return 0
    return max((part.untyped_storage().nbytes() for part in tree_leaves(args) if isinstance(part, Tensor)), default=0)


class Buckets:
    """Buckets in which DDP lets gradients lie, from its construction on (`gradient_as_bucket_view`).

    A gradient is copied there once it is complete, in the last micro-batch of a step. Until then it lies beside them.

    Args:
        model: whose gradients they are.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.of = {param: torch.empty_like(param.detach()) for param in model.parameters() if param.requires_grad}
        self.collects = True  # whether this is the last micro-batch
        for param in self.of:
            param.register_post_accumulate_grad_hook(self._collect)

    def _collect(self, param: Tensor) -> None:
        if self.collects:
            param.grad = self.of[param].copy_(param.grad)


@dataclass(frozen=True, eq=False)
class Built:
    """A run's model, made within `shadows`, and the forward pass over one of its micro-batches.

    Attributes:
        settings: with all that the model decides.
        processes: that share a batch.
        model: adapted as in the run, in training mode; sharded with FSDP.
        heads: its parts that begin where the last block ends.
        loss: the forward pass, to a scalar.
        buckets: of gradients, with DDP.
    """

    settings: Settings
    processes: int
    model: torch.nn.Module
    heads: Sequence[torch.nn.Module]
    loss: Callable[[], Tensor]
    buckets: Buckets | None = None

    @property
    def rows(self) -> int:
        """The rows of a micro-batch, and of an evaluation's batch, on one process."""
        return rows_at_once(self.settings.trainer, self.processes)

    @property
    def micro_batches(self) -> int:
        """The micro-batches of a step, on one process."""
        return -(-self.settings.trainer.batch_size // (self.rows * self.processes))

    def give_gradients(self) -> None:
        """Give each parameter that is trained a gradient."""
        there = {} if self.buckets is None else self.buckets.of
        for param in self.model.parameters():
            if param.requires_grad:
                param.grad = there[param] if param in there else torch.zeros_like(param)


class Live(TorchDispatchMode):
    """Add up live storages: `now`, and `kept` when the output layer begins; `peak` is the largest footprint."""

    def __init__(self, built: Built, optimizer: Optimizer | None) -> None:
        super().__init__()
        self._model, self._optimizer = built.model, optimizer
        self.now, self.phase, self.kept = 0, "", 0
        self._by_gloo = built.processes > 1 and built.settings.trainer.device == "cpu"
        self._sizes: weakref.WeakKeyDictionary[torch.UntypedStorage, list[int]] = weakref.WeakKeyDictionary()
        self._count((*self._model.parameters(), *self._model.buffers()))
        self._weights = self.now
        self._buckets = [] if built.buckets is None else [*built.buckets.of.values()]
        self._count(self._buckets)
        self._always = self.now
        if optimizer is not None:
            self._count(value for state in optimizer.state.values() for value in state.values())
        gradients = self._always - self._weights
        self.peak = Footprint(self._weights, gradients, self.now - self._always, 0, 0, "")

    def __enter__(self) -> Self:
        resize = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            found = resize(storage, size)
            if (known := self._sizes.get(storage)) is not None:
                self.now += size - known[0]
                known[0] = size
            return found

        self._seen = mock.patch.object(torch.UntypedStorage, "resize_", resize_)  # how FSDP frees what it gathered
        self._seen.start()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._seen.stop()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        self._count(tree_leaves(found))
        copy = _copied(func, args) if self._by_gloo else 0
        self.now += copy
        if self.now > self.peak.total:
            self.peak = self._footprint()
        self.now -= copy
        return found

    def repeat(self, passes: Footprint) -> None:
        """Count the peak of `passes` once more, beside the state and what else is in use now."""
        beside, state = self.now - self._always, self._state()
        found = replace(passes, state=state, temporaries=passes.temporaries + beside - state)
        self.peak = max(self.peak, found, key=lambda peak: peak.total)

    def _count(self, values: Iterable[Any]) -> None:
        for value in values:
            for part in _parts(value) if isinstance(value, Tensor) else ():
                if (storage := part.untyped_storage()) not in self._sizes:
                    self._sizes[storage] = size = [storage.nbytes()]
                    self.now += size[0]
                    weakref.finalize(storage, self._forget, size)

    def _forget(self, size: list[int]) -> None:
        self.now -= size[0]

    def _state(self) -> int:
        return 0 if self._optimizer is None else state_bytes(self._optimizer).total

    def _footprint(self) -> Footprint:
        there = (*self._buckets, *(param.grad for param in self._model.parameters() if param.grad is not None))
        storages = {part.untyped_storage() for tensor in there for part in _parts(tensor)}
        gradients = sum(storage.nbytes() for storage in storages)
        state = self._state()
        known = self._weights + gradients + state
        rest = self.now - known
        keeps = self.phase in ("forward", "backward")
        activations = min(rest, max(0, self.kept - known)) if keeps else 0
        return Footprint(self._weights, gradients, state, activations, rest - activations, self.phase)


Passes = Callable[[Live], Tensor]  # make a step's gradients, and return the loss


def traced(built: Built) -> Passes:
    """Return the passes of a step as they are, each time.

    At most two micro-batches are traced: more have the same peak.
    """
    count, clip_norm = min(built.micro_batches, 2), built.settings.trainer.clip_norm

    def passes(live: Live) -> Tensor:
        def head_begins(*_: Any) -> None:
            if live.phase == "forward":  # chunks of the loss are recomputed in the backward pass
                live.kept = live.now

        seen = [head.register_forward_pre_hook(head_begins) for head in built.heads]
        for number in range(1, count + 1):
            if built.buckets is not None:
                built.buckets.collects = number == count
            live.phase = "forward"
            value = built.loss()
            live.phase = "backward"
            value.backward()
        for hook in seen:
            hook.remove()
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(built.model.parameters(), clip_norm)
        return value

    return passes


def repeated(built: Built, known: Footprint) -> Passes:
    """Return passes of which only the peak is counted, since they were traced before; the gradients are made."""

    def passes(live: Live) -> Tensor:
        live.repeat(known)
        live.phase = "backward"
        built.give_gradients()
        return torch.zeros(())

    return passes


def evaluation(built: Built) -> Footprint:
    """Trace the evaluation of one batch, without an optimizer; return its peak."""
    live = Live(built, None)
    live.phase = "evaluation"
    built.model.eval()
    with torch.no_grad(), live:
        built.loss()
    built.model.train()
    return live.peak


def footprint(built: Built, optimizer: Optimizer | None, passes: Passes, steps: int) -> Footprint:
    """Trace some steps; return their peak. An optimizer's first step chooses subspaces and makes the state.

    Args:
        built: the model, and its loss.
        optimizer: of its parameters; None: the steps are the passes alone.
        passes: of each step.
        steps: how many.
    """
    live = Live(built, optimizer)
    with live:
        for _ in range(steps):
            value = passes(live)
            live.phase = "optimizer"
            if optimizer is not None:
                optimizer.step()
            built.model.zero_grad(set_to_none=True)
        del value
    return live.peak
