"""The update mathematics of entries with state: one function a rule, in place, with no state between calls.

All tensors of one call have the same shape, any shape. Decay is a separate rule, because it applies to the whole
tensor before the update, whichever rule updates an entry. `kernels` has fast forms of some rules; `state_free` has the
rules of entries without state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Full(NamedTuple):
    """One update by a state-full rule: the entries, their gradient, and the state with moments and `step`."""

    target: Tensor
    grad: Tensor  # shape of target, like the moments
    state: dict[str, Any]


class Free(NamedTuple):
    """One update by a state-free rule."""

    target: Tensor
    grad: Tensor  # shape of target; of a rule that sees more than entries, its direction
    scale: Tensor | None = None  # factor of lr, broadcasts to target: 0 where the state-full rule updates


@dataclass(frozen=True)
class Rates:
    """The numbers of one step, for the state-full or the state-free side of a parameter group.

    Args:
        lr: η·s on the subspace of split matrices, η·s·c outside it, η for all other tensors.
        decay: η·λ, without s and c.
        betas: (β₁, β₂).
        eps: ε.
    """

    lr: float
    decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


def decay_(param: Tensor, rates: Rates) -> None:
    """Apply decoupled weight decay (Loshchilov & Hutter, arXiv 1711.05101): `W ← W(1 − η·λ)`."""
    if rates.decay:
        param.mul_(1 - rates.decay)


def sign(values: Tensor) -> Tensor:
    """Return −1, 0, 1, or NaN for NaN: `torch.sign` makes it 0, and a gradient that is not finite would never show."""
    signs = values.sign()
    return torch.clamp(values, min=signs, max=signs, out=signs)


# W, g and moments have one shape; all but g are changed in place


def adamw_(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, step: float | Tensor, rates: Rates
) -> None:
    """Apply Adam with bias correction (Kingma & Ba, arXiv 1412.6980); after `decay_` it is `torch.optim.AdamW`.

    `m ← β₁m + (1 − β₁)g;  v ← β₂v + (1 − β₂)g²;  W ← W − lr/(1 − β₁ᵗ) · m / (√v/√(1 − β₂ᵗ) + ε)`

    Operations are in the order of torch's plain form, so that results agree bit for bit. `step` is t, 1 at the first
    update of these moments, or a tensor that broadcasts to `param` if entries differ in t.
    """
    beta1, beta2 = rates.betas
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    if isinstance(step, Tensor):  # float64, since digits of 1 − β₂ᵗ cancel
        first, root = ((1 - beta ** step.double()) for beta in rates.betas)
        denominator = (exp_avg_sq.sqrt() / root.sqrt().to(param.dtype)).add_(rates.eps)
        param.sub_((rates.lr / first).to(param.dtype) * exp_avg / denominator)
    else:
        root = (1 - beta2**step) ** 0.5
        denominator = (exp_avg_sq.sqrt() / root).add_(rates.eps)
        param.addcdiv_(exp_avg, denominator, value=-(rates.lr / (1 - beta1**step)))


def lion_(param: Tensor, grad: Tensor, exp_avg: Tensor, *, step: float | Tensor, rates: Rates) -> None:
    """Apply Lion (Chen et al., arXiv 2302.06675): `W ← W − lr·sign(β₁m + (1 − β₁)g);  m ← β₂m + (1 − β₂)g`.

    Its authors use betas (0.9, 0.99). There is no bias correction, so `step` is unused.
    """
    beta1, beta2 = rates.betas
    param.add_(sign(exp_avg.lerp(grad, 1 - beta1)), alpha=-rates.lr)
    exp_avg.lerp_(grad, 1 - beta2)


def sgdm_(param: Tensor, grad: Tensor, momentum_buffer: Tensor, *, step: float | Tensor, rates: Rates) -> None:
    """Apply SGD with momentum β₁, as `torch.optim.SGD` does: `b ← β₁b + g;  W ← W − lr·b`."""
    momentum_buffer.mul_(rates.betas[0]).add_(grad)
    param.add_(momentum_buffer, alpha=-rates.lr)


STATE_FULL: dict[str, Callable[..., None]] = {"adamw": adamw_, "lion": lion_, "sgdm": sgdm_}
MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "lion": ("exp_avg",), "sgdm": ("momentum_buffer",)}
