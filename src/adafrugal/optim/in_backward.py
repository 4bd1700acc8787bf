"""Updates within the backward pass: a gradient is used and freed as soon as it is complete."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress

import torch
from torch import Tensor

from adafrugal.optim.frugal import Frugal


class UpdateInBackward:
    """Makes `backward()` update each tensor as soon as its gradient is complete, and free that gradient.

    The rest of the loop stays the same; `optimizer.step()` ends the step, and schedulers work as before:

        UpdateInBackward(optimizer)
        for batch in batches:
            loss(batch).backward()
            optimizer.step()
            scheduler.step()

    The gradients of a model are never all in memory at once (LOMO, arXiv 2306.09782, does this for SGD). Each tensor
    gets the same update as without this, bit for bit. It excludes methods that need all gradients before the first
    update: several backward passes in one step, clipping by the global norm (`clip_grad_norm_` then silently does
    nothing), `torch.amp.GradScaler`, `Frugal(nonfinite=…)`. Reentrant checkpoints must not share a weight, which would
    get its gradient in parts: checkpoint with `use_reentrant=False`.

    Args:
        optimizer: `Frugal`, or a torch optimizer whose update of a tensor depends on no other tensor. It steps once for
            each tensor; a torch optimizer refuses to if another one has a gradient, too. Add all of its groups before
            (`Frugal` leaves a tensor that comes later to `step`), and keep a reference to it: once it is gone,
            gradients stay as they are without this.
        around: makes a context around each update, for example to time it.

    Raises:
        ValueError: a setting of the optimizer needs all gradients.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, around: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        if isinstance(optimizer, Frugal) and optimizer.defaults["nonfinite"] is not None:
            given = f"nonfinite is {optimizer.defaults['nonfinite']!r}"
            raise ValueError(f"{given}, which looks at all gradients before the first update: set it to None")
        self._optimizer, self._around = optimizer, around
        self._updated: set[Tensor] = set()
        self._places: dict[Tensor, tuple[int, int]] = {}  # index of the group, and in it
        self._updates = False
        params = [param for group in optimizer.param_groups for param in group["params"] if param.requires_grad]
        update = weakref.WeakMethod(self._update)  # the garbage collector cannot see references in a tensor's hook

        def hook(param: Tensor) -> None:
            if (of_optimizer := update()) is not None:  # else nobody holds the optimizer any more
                of_optimizer(param)

        self._handles = [param.register_post_accumulate_grad_hook(hook) for param in params]
        self._handles.append(optimizer.register_step_post_hook(self._stepped))  # a reference that keeps this alive

    def remove(self) -> None:
        """Let `optimizer.step()` make the updates again."""
        for handle in self._handles:
            handle.remove()

    def _update(self, param: Tensor) -> None:
        frugal = self._optimizer if isinstance(self._optimizer, Frugal) else None
        if frugal and not frugal._attempt.has_begun:
            self._updated.clear()  # also of a step that failed, since which a state was loaded
        if param in self._updated:
            param.grad = None
            raise RuntimeError(
                "a second backward pass in one step: with UpdateInBackward each is a step of its own; call "
                "optimizer.step() after each, or do without it. (Or reentrant checkpoints share a weight, so that its "
                "gradient comes in parts: checkpoint with use_reentrant=False)"
            )
        if (place := self._place_of(param)) is None:
            return
        with self._around():
            if frugal:
                frugal._update_one(*place)
            else:
                self._refuse_others(param)
                self._updates = True
                try:
                    self._optimizer.step()
                finally:
                    self._updates = False
        param.grad = None
        self._updated.add(param)

    def _place_of(self, param: Tensor) -> tuple[int, int] | None:
        """Return the indices of a parameter's group, and of the parameter in it; None if no group has it any more."""
        groups = self._optimizer.param_groups
        with suppress(KeyError, IndexError):
            index, place = self._places[param]
            if groups[index]["params"][place] is param:
                return index, place
        self._places = {p: (i, k) for i, group in enumerate(groups) for k, p in enumerate(group["params"])}
        return self._places.get(param)

    def _refuse_others(self, param: Tensor) -> None:
        others = (p for group in self._optimizer.param_groups for p in group["params"] if p is not param)
        if any(other.grad is not None for other in others):
            raise RuntimeError(
                "another tensor has a gradient, too, and would be updated with this one: call optimizer.zero_grad() "
                "before, and make UpdateInBackward when all groups are there"
            )

    def _stepped(self, *_: object) -> None:
        if not self._updates:
            self._updated.clear()
