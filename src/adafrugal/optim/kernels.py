"""Rules applied to many tensors: in plain form one after the other, or in fast forms that agree with it.

State-full AdamW has torch's fused kernel. The state-free update, which no library has, is compiled: one pass over
weights and gradients. Compilation takes seconds and depends on shapes, so it is arranged to happen once: tensors are
flattened and come in groups of a fixed number with sizes left open; which of them are state-free at a step then does
not matter.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from adafrugal.optim import rules
from adafrugal.optim.rules import Rates
from adafrugal.optim.subspaces import Free

_COMPILED_FROM = 2**24  # entries of a group; compiling takes seconds, which smaller models do not win back
_AT_ONCE = 2**24  # entries of tensors that are updated in one launch
_TOGETHER = 16  # flattened tensors in one compiled call
_LEAST, _MOST = 1024, 2**31  # entries; what is smaller is not worth it, what is larger needs other indices


class Full(NamedTuple):
    """What a state-full rule is to update: target, gradient, and the state with its moments and `step`."""

    target: Tensor
    grad: Tensor
    state: dict[str, Any]


def state_full(rule: str, works: Sequence[Full], rates: Rates, *, fused: bool) -> None:
    """One step of a state-full rule, decay included; counts the steps.

    Args:
        rule: a name of `rules.STATE_FULL`.
        works: what is updated.
        rates: of the rule.
        fused: use torch's fused AdamW where it can be.
    """
    fast = [fused and rule == "adamw" and _suits_fused(work, rates) for work in works]
    _fused_adamw([work for work, f in zip(works, fast, strict=True) if f], rates)
    for target, grad, state in (work for work, f in zip(works, fast, strict=True) if not f):
        state["step"] += 1
        on_host = state["step"].ndim == 0 and state["step"].device.type == "cpu"
        step = state["step"].item() if on_host else state["step"]
        moments = (state[name] for name in rules.STATE_FULL[rule].moments)
        rules.decay_(target, rates)
        rules.STATE_FULL[rule].update(target, grad, *moments, step=step, rates=rates)


def _suits_fused(work: Full, rates: Rates) -> bool:
    target, grad, state = work
    alike = target.dtype == grad.dtype == state["exp_avg"].dtype and target.shape == state["exp_avg"].shape
    device = target.device.type in ("cpu", "cuda") and state["step"].device == target.device
    laid_out = target.is_contiguous() and grad.is_contiguous()
    return alike and device and laid_out and state["step"].ndim == 0 and bool(rates.lr or not rates.decay)


def _fused_adamw(works: Sequence[Full], rates: Rates) -> None:
    """`rules.decay_` and `rules.adamw_` for all tensors in torch's own kernel: each byte is read and written once.

    The kernel is called as `torch.optim.AdamW(fused=True)` calls it, without the preparations there, which would be
    repeated for every matrix of a subspace that works on copies.
    """
    for some in _alike(works):
        steps = [work.state["step"] for work in some]
        torch._foreach_add_(steps, 1)
        torch._fused_adamw_(
            [work.target for work in some],
            [work.grad for work in some],
            [work.state["exp_avg"] for work in some],
            [work.state["exp_avg_sq"] for work in some],
            [],
            steps,
            amsgrad=False, maximize=False, beta1=rates.betas[0], beta2=rates.betas[1], eps=rates.eps,
            lr=rates.lr, weight_decay=rates.decay / rates.lr if rates.lr else 0.0,
        )  # fmt: skip


def _alike(works: Sequence[Full]) -> Iterable[list[Full]]:
    """Those of one device and dtype together, as the kernel needs them."""
    found: dict[tuple[torch.device, torch.dtype], list[Full]] = {}
    for work in works:
        found.setdefault((work.target.device, work.target.dtype), []).append(work)
    return found.values()


def compiles(group: Mapping[str, Any]) -> bool:
    """Whether a group's state-free update is compiled: as it says, or where it is large and on a CPU.

    On a GPU compiling was measured to be slower at every size.
    """
    if group["compile"] is None:
        large = sum(param.numel() for param in group["params"]) >= _COMPILED_FROM
        return large and not any(param.is_cuda for param in group["params"])
    return group["compile"]


def state_free(rule: str, frees: Sequence[Free], rates: Rates, *, compiled: bool) -> None:
    """One step of a state-free rule, decay included.

    Args:
        rule: a name of `rules.STATE_FREE`.
        frees: what is updated. Those compiled into one call must not share storage, which neighbours in a matrix do;
            so the parts of a matrix are given in separate calls.
        rates: of the rule.
        compiled: use the compiled form where it can be.
    """
    flat, scaled, others = [], [], []
    for free in frees:
        if not (compiled and rule != "none" and _suits_compiled(free)):
            others.append(free)
        else:
            (flat if free.scale is None else scaled).append(free)
    left = others + _flattened(rule, flat, rates) + _scaled(rule, scaled, rates)
    for target, grad, scale in _launched(rule, left, rates):
        rules.decay_(target, rates)
        rules.STATE_FREE[rule](target, grad, rates, scale)


def _launched(rule: str, frees: Sequence[Free], rates: Rates) -> list[Free]:
    """Update whole tensors on a GPU, many in one launch; returns what could not be."""
    found: dict[tuple[torch.device, torch.dtype, torch.dtype], list[Free]] = {}
    left = []
    for free in frees:
        if free.scale is None and _costs_a_launch(free.target):
            found.setdefault((free.target.device, free.target.dtype, free.grad.dtype), []).append(free)
        else:
            left.append(free)
    for alike in found.values():
        for some in _chunks(alike):
            _foreach(rule, [free.target for free in some], [free.grad for free in some], rates)
    return left


def _costs_a_launch(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _chunks(frees: Sequence[Free]) -> Iterator[list[Free]]:
    """Tensors of at most `_AT_ONCE` entries together, or one: a copy of their gradients is made."""
    some: list[Free] = []
    for free in frees:
        if some and sum(f.target.numel() for f in some) + free.target.numel() > _AT_ONCE:
            yield some
            some = []
        some.append(free)
    if some:
        yield some


def _foreach(rule: str, targets: list[Tensor], grads: list[Tensor], rates: Rates) -> None:
    """`rules.decay_` and a rule of `rules.STATE_FREE` for tensors of one device and dtype."""
    if rates.decay:
        torch._foreach_mul_(targets, 1 - rates.decay)
    if rule == "signsgd":
        grads = torch._foreach_sign(grads)
    if rule != "none":
        torch._foreach_add_(targets, grads, alpha=-rates.lr)


def _suits_compiled(free: Free) -> bool:
    plain = type(free.target) in (Tensor, Parameter) and type(free.grad) is Tensor
    alike = plain and free.target.dtype == free.grad.dtype
    if free.scale is not None and min(free.target.shape) == 1:
        return False
    sized = _LEAST <= free.target.numel() < _MOST
    return alike and sized and free.target.is_contiguous() and free.grad.is_contiguous()


def _flattened(rule: str, frees: Sequence[Free], rates: Rates) -> list[Free]:
    """Update whole tensors, so many in one call; returns what could not be."""
    left = []
    for start in range(0, len(frees), _TOGETHER):
        some = frees[start : start + _TOGETHER]
        like = some[0].target
        alike = all(free.target.dtype == like.dtype and free.target.device == like.device for free in some)
        apart = len({free.target.untyped_storage().data_ptr() for free in some}) == len(some)
        update = _compiled(_FLAT[rule], like.dtype, like.device, None) if alike and apart else None
        if update is None:
            left += some
            continue
        # detached last: torch.compile would look through a view, at shapes and flags of what it is a view of
        pairs = [(free.target.view(-1).detach(), free.grad.view(-1).detach()) for free in some]
        pairs += _fillers(like.dtype, like.device)[len(pairs) :]
        update([target for target, _ in pairs], [grad for _, grad in pairs], *_scalars(rates))
    return left


def _scaled(rule: str, frees: Sequence[Free], rates: Rates) -> list[Free]:
    """Update matrices of which some lines stand still, one after the other; returns what could not be."""
    left = []
    for free in frees:
        axis = 0 if free.scale.shape[0] == 1 else 1
        update = _compiled(_SCALED[rule], free.target.dtype, free.target.device, axis)
        if update is None:
            left.append(free)
        else:
            update(free.target.detach(), free.grad.detach(), free.scale, *_scalars(rates))
    return left


@functools.lru_cache(maxsize=4)  # one step asks for the same again and again
def _scalars(rates: Rates) -> tuple[Tensor, Tensor]:
    """The rate and what decay leaves, as tensors: as numbers, each new value would compile anew."""
    return torch.tensor(rates.lr, dtype=torch.float64), torch.tensor(1 - rates.decay, dtype=torch.float64)


# -- what is compiled -------------------------------------------------------------------------------------------------


def _signsgd_all(targets: list[Tensor], grads: list[Tensor], lr: Tensor, kept: Tensor) -> None:
    for target, grad in zip(targets, grads, strict=True):
        target.copy_(target * kept - grad.sign() * lr)


def _sgd_all(targets: list[Tensor], grads: list[Tensor], lr: Tensor, kept: Tensor) -> None:
    for target, grad in zip(targets, grads, strict=True):
        target.copy_(target * kept - grad * lr)


def _signsgd_scaled(target: Tensor, grad: Tensor, scale: Tensor, lr: Tensor, kept: Tensor) -> None:
    target.copy_(target * kept - grad.sign() * (scale * lr))


def _sgd_scaled(target: Tensor, grad: Tensor, scale: Tensor, lr: Tensor, kept: Tensor) -> None:
    target.copy_(target * kept - grad * (scale * lr))


_FLAT = {"signsgd": _signsgd_all, "sgd": _sgd_all}
_SCALED = {"signsgd": _signsgd_scaled, "sgd": _sgd_scaled}


@functools.cache
def _compiled(
    update: Callable[..., None], dtype: torch.dtype, device: torch.device, axis: int | None
) -> Callable[..., None] | None:
    """A function compiled for all sizes, tried once on small tensors; None where this machine cannot compile.

    torch.compile checks at every call what it took for granted, which for so short a pass costs a tenth of its time.
    All of it holds here by construction (dtype, device, number, contiguity, no grad, 2 entries or more along each
    axis) and so the checks are left out; each dtype, device and axis has code of its own, since it is by the code
    that torch.compile finds what it compiled.

    Args:
        update: one of the functions above.
        dtype: of all tensors.
        device: of all tensors.
        axis: along which `scale` is 1 entry long; None for a function without one.
    """
    code = update.__code__.replace(co_name=f"{update.__name__}_{dtype}_{device}_{axis}")
    unchecked = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    compiled = torch.compile(FunctionType(code, update.__globals__), dynamic=True, options=unchecked)
    lr, kept = _scalars(Rates(lr=0.0))
    fillers = _fillers(dtype, device)
    try:
        if axis is None:
            compiled([target for target, _ in fillers], [grad for _, grad in fillers], lr, kept)
        else:
            target, grad = (torch.zeros(48, 40, dtype=dtype, device=device) for _ in range(2))
            compiled(target, grad, torch.ones_like(target.narrow(axis, 0, 1)), lr, kept)
    except Exception as error:  # of whatever kind: nothing but the fillers is touched
        reason = str(error).strip().splitlines()[0]
        warnings.warn(f"torch.compile does not work here ({reason}); the plain form is used", stacklevel=2)
        return None
    return compiled


def forget_compiled() -> None:
    """Compile anew at the next update: to be called with `torch.compiler.reset`.

    What is cached here was compiled for all sizes by its first call. After a reset torch would compile it at the next
    call, take equal sizes there for a rule, and check nothing.
    """
    _compiled.cache_clear()


@functools.cache
def _fillers(dtype: torch.dtype, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Pairs of targets and gradients that fill up a group. No two are of one size, lest that be taken for a rule."""
    with torch.inference_mode(False):  # they outlast the step
        made = [[torch.zeros(_LEAST + i, dtype=dtype, device=device) for _ in "pg"] for i in range(_TOGETHER)]
    return [(target, grad) for target, grad in made]
