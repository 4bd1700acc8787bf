"""The state-free update on a CPU, compiled: one pass over weights and gradients.

No library has a kernel for it. Compiling takes seconds and depends on shapes. To compile only once, whichever tensors
are state-free at a step, tensors are flattened and passed in lists of fixed length with dynamic sizes.
"""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from adafrugal.optim.options import Group
from adafrugal.optim.rules import Free, Rates

_COMPILED_FROM = 2**24  # entries of a group; smaller models do not win back the seconds of compiling
_TOGETHER = 16  # flattened tensors in one compiled call
_LEAST, _MOST = 1024, 2**31  # entries; compiling does not pay below, and needs wider indices above


def compiles(group: Group) -> bool:
    """Return whether to compile a group's state-free update on a CPU: by default, if it is large."""
    if group["compile"] is not None:
        return group["compile"]
    return sum(param.numel() for param in group["params"]) >= _COMPILED_FROM


def _signsgd(targets: list[Tensor], grads: list[Tensor], scale: Tensor | None, lr: Tensor, kept: Tensor) -> None:
    for target, grad in zip(targets, grads, strict=True):
        sign = torch.where(grad == grad, grad.sign(), grad)  # NaN for NaN; isnan() takes twice the time of all
        target.copy_(target * kept - sign * (lr if scale is None else scale * lr))


def _sgd(targets: list[Tensor], grads: list[Tensor], scale: Tensor | None, lr: Tensor, kept: Tensor) -> None:
    for target, grad in zip(targets, grads, strict=True):
        target.copy_(target * kept - grad * (lr if scale is None else scale * lr))


_TO_COMPILE = {"signsgd": _signsgd, "sgd": _sgd}


def _suits(update: Free) -> bool:
    target, grad, scale = update
    if type(target) not in (Tensor, Parameter) or type(grad) is not Tensor or target.dtype != grad.dtype:
        return False
    laid_out = target.device.type == "cpu" and target.is_contiguous() and grad.is_contiguous()
    return laid_out and _LEAST <= target.numel() < _MOST and (scale is None or min(target.shape) > 1)


def update(rule: str, updates: Sequence[Free], rates: Rates) -> list[Free]:
    """Update tensors without a scale in calls of `_TOGETHER`, those with one singly; return all others."""
    if rule not in _TO_COMPILE:
        return list(updates)
    left = []
    together: dict[Any, list[Free]] = {}  # no two of a list share storage: torch.compile would guard aliasing
    seen: Counter[int] = Counter()
    for update in updates:
        target = update.target
        if not _suits(update):
            left.append(update)
        elif update.scale is not None:
            left += _call(rule, [update], 0 if update.scale.shape[0] == 1 else 1, rates)
        else:
            storage = target.untyped_storage().data_ptr()
            together.setdefault((target.dtype, target.device, seen[storage]), []).append(update)
            seen[storage] += 1
    for some in together.values():
        for start in range(0, len(some), _TOGETHER):
            left += _call(rule, some[start : start + _TOGETHER], None, rates)
    return left


def _call(rule: str, some: list[Free], axis: int | None, rates: Rates) -> list[Free]:
    """Update tensors in one call, flattened if there is no scale; return them if this machine cannot compile."""
    dtype, device = some[0].target.dtype, some[0].target.device
    if (compiled := _compiled(rule, dtype, device, axis, _TOGETHER)) is None:
        return some
    # detach last: torch.compile would guard the shape and flags of a view's base
    pairs = [(target.detach(), grad.detach()) for target, grad, _ in some]
    if axis is None:
        pairs = [(target.view(-1).detach(), grad.view(-1).detach()) for target, grad, _ in some]
        pairs += _fillers(dtype, device)[len(some) :]
    compiled([target for target, _ in pairs], [grad for _, grad in pairs], some[0].scale, *_scalars(rates))
    return []


@functools.lru_cache(maxsize=4)  # one step needs the same rates many times
def _scalars(rates: Rates) -> tuple[Tensor, Tensor]:
    """Return lr and 1 − decay as tensors []: as numbers, each new value would recompile."""
    lr, kept = (torch.tensor(number, dtype=torch.float64, device="cpu") for number in (rates.lr, 1 - rates.decay))
    return lr, kept


@functools.cache
def _fillers(dtype: torch.dtype, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Return (target [n], gradient [n]) pairs that fill up a call.

    All sizes differ, or torch.compile would specialise on equality.
    """
    with torch.inference_mode(False):  # they outlast the step
        made = [[torch.zeros(_LEAST + i, dtype=dtype, device=device) for _ in "pg"] for i in range(_TOGETHER)]
    return [(target, grad) for target, grad in made]


@functools.cache
def _compiled(
    rule: str, dtype: torch.dtype, device: torch.device, axis: int | None, number: int
) -> Callable[..., None] | None:
    """Compile a rule for all sizes and try it on small tensors; return None if this machine cannot compile.

    `axis` is the axis along which `scale` has one entry; None for `number` flat tensors without a scale.

    torch.compile's checks at each call take 5 to 9% of a step with columns or rows. All that they check holds here
    (dtype, device, number, contiguity, no grad, sizes of 2 or more), so they are left out. It finds compiled code by
    the code object: each choice has one of its own.
    """
    code = _TO_COMPILE[rule].__code__.replace(co_name=f"{rule}_{dtype}_{device}_{axis}_{number}")
    compiled = torch.compile(
        FunctionType(code, globals()), dynamic=True,
        options={"guard_filter_fn": torch.compiler.skip_all_guards_unsafe},
    )  # fmt: skip
    pairs, scale = _fillers(dtype, device), None
    if axis is not None:
        target = torch.zeros(48, 40, dtype=dtype, device=device)
        pairs, scale = [(target, target.clone())], torch.ones_like(target.narrow(axis, 0, 1))
    try:
        compiled([target for target, _ in pairs], [grad for _, grad in pairs], scale, *_scalars(Rates(lr=0.0)))
    except Exception as error:  # of any class: the trial changes only these tensors
        reason = str(error).strip().splitlines()[0]
        warnings.warn(f"torch.compile does not work here ({reason}); the plain form is used", stacklevel=2)
        return None
    return compiled
