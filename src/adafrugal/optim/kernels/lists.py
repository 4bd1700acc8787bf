"""Apply rules to lists of tensors: in plain form one after the other, or by kernels for many tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from adafrugal.optim import rules
from adafrugal.optim.kernels import compiled as _compiled
from adafrugal.optim.rules import Free, Full, Rates
from adafrugal.optim.state_free import StateFree

_AT_ONCE = 2**24  # entries of tensors updated in one launch, which copies their gradients

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
    laid_out = target.is_contiguous() and grad.is_contiguous() and state["exp_avg"].is_contiguous()
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


def state_free(rule: StateFree, updates: Sequence[Free], rates: Rates, *, fused: bool, compiled: bool) -> None:
    """Apply a state-free rule once, decay included; gradients are all that the rule sees at once.

    Compiled forms (if `compiled`) and, on a GPU, forms for many tensors (if `fused`) are used where the rule has one
    that suits the tensors.
    """
    left = _compiled.update(rule.kind, updates, rates) if compiled else updates
    together, alone = [], []
    for update in left:
        is_fast = fused and rule.kind in _TO_ADD and update.scale is None and _costs_a_launch(update.target)
        (together if is_fast else alone).append(update)
    for alike in _alike(together):
        for some in _chunks(alike):
            _foreach(rule.kind, [update.target for update in some], [update.grad for update in some], rates)
    for target, grad, scale in alone:
        rules.decay_(target, rates)
        rule.update_(target, grad, rates, scale)


def _costs_a_launch(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _chunks(updates: Sequence[Free]) -> list[list[Free]]:
    """Divide updates into lists of at most `_AT_ONCE` entries, or of one tensor."""
    chunks: list[list[Free]] = []
    entries = 0
    for update in updates:
        entries += update.target.numel()
        if not chunks or entries > _AT_ONCE:
            chunks.append([])
            entries = update.target.numel()
        chunks[-1].append(update)
    return chunks


def _signs(grads: list[Tensor]) -> Sequence[Tensor]:
    """Return `rules.sign` of each."""
    signs = torch._foreach_sign(grads)
    bounded = torch._foreach_maximum(grads, signs)
    torch._foreach_minimum_(bounded, signs)
    return bounded


# rule -> function from the gradients of many tensors to the tensors to add, times −lr
_TO_ADD: dict[str, Callable[[list[Tensor]], Sequence[Tensor]]] = {
    "signsgd": _signs,
    "sgd": lambda grads: grads,
    "none": lambda grads: (),
}


def _foreach(rule: str, targets: list[Tensor], grads: list[Tensor], rates: Rates) -> None:
    """Apply `rules.decay_` and a rule of `_TO_ADD` to tensors of one device and dtype."""
    if rates.decay:
        torch._foreach_mul_(targets, 1 - rates.decay)
    if added := _TO_ADD[rule](grads):
        torch._foreach_add_(targets, added, alpha=-rates.lr)
