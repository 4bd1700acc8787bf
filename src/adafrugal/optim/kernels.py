"""Rules applied to many tensors: in plain form one after the other, or in fast forms that agree with it.

State-full AdamW has torch's fused kernel. The state-free update, which no library has, is compiled: one pass over
weights and gradients, whose sizes are left open since compiling takes seconds.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from adafrugal.optim import rules
from adafrugal.optim.options import Group
from adafrugal.optim.rules import Free, Full, Rates

_COMPILED_FROM = 2**24  # entries of a group; compiling takes seconds, which smaller models do not win back
_AT_ONCE = 2**24  # entries of tensors that are updated in one launch, for which a copy of their gradients is made
_LEAST, _MOST = 1024, 2**31  # entries; compiling does not pay below, and above other indices are needed

Update = TypeVar("Update", Full, Free)


def state_full(rule: str, updates: Sequence[Full], rates: Rates, *, fused: bool) -> None:
    """Make one step of a rule of `rules.STATE_FULL`, decay included; count the steps.

    With `fused`, AdamW is torch's fused kernel where it can be.
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
    """`rules.decay_` and `rules.adamw_` in torch's own kernel: each byte is read and written once.

    The kernel is called as `torch.optim.AdamW(fused=True)` calls it, without the preparations there, which would be
    repeated for every matrix of a subspace that works on copies.
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
    """Those of one device and one pair of dtypes together."""
    found: dict[tuple[torch.device, torch.dtype, torch.dtype], list[Update]] = {}
    for update in updates:
        found.setdefault((update.target.device, update.target.dtype, update.grad.dtype), []).append(update)
    yield from found.values()


def compiles(group: Group) -> bool:
    """Whether a group's state-free update is compiled: by default, where it is large and on a CPU.

    On a GPU compiling was measured to be slower at every size.
    """
    if group["compile"] is not None:
        return group["compile"]
    large = sum(param.numel() for param in group["params"]) >= _COMPILED_FROM
    return large and not any(param.is_cuda for param in group["params"])


def state_free(rule: str, updates: Sequence[Free], rates: Rates, *, compiled: bool) -> None:
    """Make one step of a rule of `rules.STATE_FREE`, decay included; compiled where it can be and `compiled`."""
    launched, plain = [], []
    for update in updates:
        if not (compiled and rule != "none" and _update_compiled(rule, update, rates)):
            (launched if update.scale is None and _costs_a_launch(update.target) else plain).append(update)
    for alike in _alike(launched):
        for some in _chunks(alike):
            _foreach(rule, [update.target for update in some], [update.grad for update in some], rates)
    for target, grad, scale in plain:
        rules.decay_(target, rates)
        rules.STATE_FREE[rule](target, grad, rates, scale)


def _costs_a_launch(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _chunks(updates: Sequence[Free]) -> list[list[Free]]:
    """Tensors of at most `_AT_ONCE` entries together, or one."""
    chunks: list[list[Free]] = []
    entries = _AT_ONCE
    for update in updates:
        entries += update.target.numel()
        if entries > _AT_ONCE:
            chunks.append([])
            entries = update.target.numel()
        chunks[-1].append(update)
    return chunks


def _foreach(rule: str, targets: list[Tensor], grads: Sequence[Tensor], rates: Rates) -> None:
    """`rules.decay_` and a rule of `rules.STATE_FREE` for tensors of one device and dtype."""
    if rates.decay:
        torch._foreach_mul_(targets, 1 - rates.decay)
    if rule == "signsgd":
        grads = torch._foreach_sign(grads)
    if rule != "none":
        torch._foreach_add_(targets, grads, alpha=-rates.lr)


# -- compiled ---------------------------------------------------------------------------------------------------------


def _signsgd(target: Tensor, grad: Tensor, scale: Tensor | None, lr: Tensor, kept: Tensor) -> None:
    target.copy_(target * kept - grad.sign() * (lr if scale is None else scale * lr))


def _sgd(target: Tensor, grad: Tensor, scale: Tensor | None, lr: Tensor, kept: Tensor) -> None:
    target.copy_(target * kept - grad * (lr if scale is None else scale * lr))


_TO_COMPILE = {"signsgd": _signsgd, "sgd": _sgd}


def _update_compiled(rule: str, update: Free, rates: Rates) -> bool:
    """Update a tensor by a compiled rule; False where that cannot be."""
    target, grad, scale = update
    if type(target) not in (Tensor, Parameter) or type(grad) is not Tensor or target.dtype != grad.dtype:
        return False
    laid_out = target.is_contiguous() and grad.is_contiguous()
    if not (laid_out and _LEAST <= target.numel() < _MOST) or (scale is not None and min(target.shape) == 1):
        return False
    axis = None if scale is None else 0 if scale.shape[0] == 1 else 1
    compiled = _compiled(rule, target.dtype, target.device, axis)
    if compiled is None:
        return False
    if scale is None:  # flat, since each number of dimensions would be compiled anew
        target, grad = target.view(-1), grad.view(-1)
    compiled(target.detach(), grad.detach(), scale, *_scalars(rates))  # a view would be guarded with its base
    return True


@functools.lru_cache(maxsize=4)  # one step asks for the same again and again
def _scalars(rates: Rates) -> tuple[Tensor, Tensor]:
    """The rate and what decay leaves, as tensors []: as numbers, each new value would compile anew."""
    return torch.tensor(rates.lr, dtype=torch.float64), torch.tensor(1 - rates.decay, dtype=torch.float64)


@functools.cache
def _compiled(rule: str, dtype: torch.dtype, device: torch.device, axis: int | None) -> Callable[..., None] | None:
    """Compile a rule for all sizes, and try it on small tensors; None where this machine cannot compile.

    The sizes of a matrix differ here, so that torch.compile does not specialise on equality. `axis` is where `scale`
    is 1 entry long; None for flat tensors without a scale.
    """
    compiled = torch.compile(_TO_COMPILE[rule], dynamic=True)
    shape = (_LEAST,) if axis is None else (48, 40)
    target, grad = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
    scale = None if axis is None else torch.ones_like(target.narrow(axis, 0, 1))
    try:
        compiled(target, grad, scale, *_scalars(Rates(lr=0.0)))
    except Exception as error:  # of whatever kind: only these tensors are touched
        reason = str(error).strip().splitlines()[0]
        warnings.warn(f"torch.compile does not work here ({reason}); the plain form is used", stacklevel=2)
        return None
    return compiled
