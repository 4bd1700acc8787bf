"""Apply rules to many tensors: in plain form one after the other, or in fast forms that agree with it.

State-full AdamW uses torch's fused kernel. No library has a kernel for the state-free update, so it is compiled: one
pass over weights and gradients. Compiling takes seconds and depends on shapes. To compile only once, whichever tensors
are state-free at a step, tensors are flattened and passed in lists of fixed length with dynamic sizes.
"""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from adafrugal.optim import rules
from adafrugal.optim.options import Group
from adafrugal.optim.rules import Free, Full, Rates

_COMPILED_FROM = 2**24  # entries of a group; smaller models do not win back the seconds of compiling
_TOGETHER = 16  # flattened tensors in one compiled call
_AT_ONCE = 2**24  # entries of tensors updated in one launch, which copies their gradients
_LEAST, _MOST = 1024, 2**31  # entries; compiling does not pay below, and needs wider indices above

Update = TypeVar("Update", Full, Free)


def state_full(rule: str, updates: Sequence[Full], rates: Rates, *, fused: bool) -> None:
    """Apply a rule of `rules.STATE_FULL` once, decay included; count the steps.

    With `fused`, AdamW runs in torch's fused kernel where the tensors suit it.
    """
    fast, plain = [], []
    for update in updates:
        (fast if fused and rule == "adamw" and _suits_fused(update, rates) else plain).append(update)
    for alike in _alike(fast):
        _fused_adamw(alike, rates)
    for target, grad, state in plain:
        state["step"] += 1
        on_host = state["step"].ndim == 0 and state["step"].device.type == "cpu"
        step = state["step"].item() if on_host else state["step"]
        rules.decay_(target, rates)
        rules.STATE_FULL[rule](target, grad, *(state[name] for name in rules.MOMENTS[rule]), step=step, rates=rates)


def _suits_fused(update: Full, rates: Rates) -> bool:
    target, grad, state = update
    alike = target.dtype == grad.dtype == state["exp_avg"].dtype and target.shape == state["exp_avg"].shape
    device = target.device.type in ("cpu", "cuda") and state["step"].device == target.device
    laid_out = target.is_contiguous() and grad.is_contiguous()
    return alike and device and laid_out and state["step"].ndim == 0 and bool(rates.lr or not rates.decay)


def _fused_adamw(updates: Sequence[Full], rates: Rates) -> None:
    """Apply `rules.decay_` and `rules.adamw_` in torch's fused kernel, which reads and writes each byte once.

    The call is that of `torch.optim.AdamW(fused=True)`, without its preparations, which would be repeated for every
    matrix of a subspace that works on copies.
    """
    targets, grads, states = zip(*updates, strict=True)
    steps = [state["step"] for state in states]
    torch._foreach_add_(steps, 1)
    torch._fused_adamw_(
        targets, grads, [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states], [], steps,
        amsgrad=False, maximize=False, beta1=rates.betas[0], beta2=rates.betas[1], eps=rates.eps,
        lr=rates.lr, weight_decay=rates.decay / rates.lr if rates.lr else 0.0,
    )  # fmt: skip


def _alike(updates: Sequence[Update]) -> Iterator[list[Update]]:
    """Yield lists of updates with one device and one pair of dtypes."""
    found: dict[tuple[torch.device, torch.dtype, torch.dtype], list[Update]] = {}
    for update in updates:
        found.setdefault((update.target.device, update.target.dtype, update.grad.dtype), []).append(update)
    yield from found.values()


def compiles(group: Group) -> bool:
    """Return whether to compile a group's state-free update: by default, if it is large and on a CPU.

    On a GPU the compiled form was slower at every size measured.
    """
    if group["compile"] is not None:
        return group["compile"]
    large = sum(param.numel() for param in group["params"]) >= _COMPILED_FROM
    return large and not any(param.is_cuda for param in group["params"])


def state_free(rule: str, updates: Sequence[Free], rates: Rates, *, compiled: bool) -> None:
    """Apply a rule of `rules.STATE_FREE` once, decay included.

    Compiled forms (if `compiled`) and forms for many tensors are used where the rule has one that suits the tensors.
    """
    left = _update_compiled(rule, updates, rates) if compiled and rule in _TO_COMPILE else updates
    together, alone = [], []
    for update in left:
        is_fast = rule in _TO_ADD and update.scale is None and _costs_a_launch(update.target)
        (together if is_fast else alone).append(update)
    for alike in _alike(together):
        for some in _chunks(alike):
            _foreach(rule, [update.target for update in some], [update.grad for update in some], rates)
    for target, grad, scale in alone:
        rules.decay_(target, rates)
        rules.STATE_FREE[rule](target, grad, rates, scale)


def _costs_a_launch(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _chunks(updates: Sequence[Free]) -> list[list[Free]]:
    """Divide updates into lists of at most `_AT_ONCE` entries, or of one tensor."""
    chunks: list[list[Free]] = []
    entries = _AT_ONCE
    for update in updates:
        entries += update.target.numel()
        if entries > _AT_ONCE:
            chunks.append([])
            entries = update.target.numel()
        chunks[-1].append(update)
    return chunks


# rule -> function from the gradients of many tensors to the tensors to add, times −lr
_TO_ADD: dict[str, Callable[[list[Tensor]], Sequence[Tensor]]] = {
    "signsgd": torch._foreach_sign,
    "sgd": lambda grads: grads,
    "none": lambda grads: (),
}


def _foreach(rule: str, targets: list[Tensor], grads: list[Tensor], rates: Rates) -> None:
    """Apply `rules.decay_` and a rule of `_TO_ADD` to tensors of one device and dtype."""
    if rates.decay:
        torch._foreach_mul_(targets, 1 - rates.decay)
    if added := _TO_ADD[rule](grads):
        torch._foreach_add_(targets, added, alpha=-rates.lr)


# -- compiled ---------------------------------------------------------------------------------------------------------


def _signsgd(targets: list[Tensor], grads: list[Tensor], scale: Tensor | None, lr: Tensor, kept: Tensor) -> None:
    for target, grad in zip(targets, grads, strict=True):
        target.copy_(target * kept - grad.sign() * (lr if scale is None else scale * lr))


def _sgd(targets: list[Tensor], grads: list[Tensor], scale: Tensor | None, lr: Tensor, kept: Tensor) -> None:
    for target, grad in zip(targets, grads, strict=True):
        target.copy_(target * kept - grad * (lr if scale is None else scale * lr))


_TO_COMPILE = {"signsgd": _signsgd, "sgd": _sgd}


def _suits_compiled(update: Free) -> bool:
    target, grad, scale = update
    if type(target) not in (Tensor, Parameter) or type(grad) is not Tensor or target.dtype != grad.dtype:
        return False
    laid_out = target.is_contiguous() and grad.is_contiguous()
    return laid_out and _LEAST <= target.numel() < _MOST and (scale is None or min(target.shape) > 1)


def _update_compiled(rule: str, updates: Sequence[Free], rates: Rates) -> list[Free]:
    """Update tensors without a scale in calls of `_TOGETHER`, those with one singly; return all others."""
    left = []
    together: dict[Any, list[Free]] = {}  # no two of a list share storage: torch.compile would guard aliasing
    seen: Counter[int] = Counter()
    for update in updates:
        target = update.target
        if not _suits_compiled(update):
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
    if (compiled := _compiled(rule, dtype, device, axis)) is None:
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
    return torch.tensor(rates.lr, dtype=torch.float64), torch.tensor(1 - rates.decay, dtype=torch.float64)


@functools.cache
def _fillers(dtype: torch.dtype, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Return (target [n], gradient [n]) pairs that fill up a call.

    All sizes differ, or torch.compile would specialise on equality.
    """
    with torch.inference_mode(False):  # they outlast the step
        made = [[torch.zeros(_LEAST + i, dtype=dtype, device=device) for _ in "pg"] for i in range(_TOGETHER)]
    return [(target, grad) for target, grad in made]


@functools.cache
def _compiled(rule: str, dtype: torch.dtype, device: torch.device, axis: int | None) -> Callable[..., None] | None:
    """Compile a rule for all sizes and try it on small tensors; return None if this machine cannot compile.

    `axis` is the axis along which `scale` has one entry; None for flat tensors without a scale.
    """
    compiled = torch.compile(_TO_COMPILE[rule], dynamic=True)
    pairs, scale = _fillers(dtype, device), None
    if axis is not None:
        pairs = [tuple(torch.zeros(48, 40, dtype=dtype, device=device) for _ in range(2))]
        scale = torch.ones_like(pairs[0][0].narrow(axis, 0, 1))
    try:
        compiled([target for target, _ in pairs], [grad for _, grad in pairs], scale, *_scalars(Rates(lr=0.0)))
    except Exception as error:  # of any class: the trial changes only these tensors
        reason = str(error).strip().splitlines()[0]
        warnings.warn(f"torch.compile does not work here ({reason}); the plain form is used", stacklevel=2)
        return None
    return compiled
