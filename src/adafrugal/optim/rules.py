"""The update mathematics: one function a rule, in place on the tensors given, nothing remembered in between.

All tensors of one call have the same shape. Decay is a rule of its own, because it applies to the whole tensor, before
the update, whatever rule updates which entry.
"""

from __future__ import annotations

from torch import Tensor


def decay_(param: Tensor, *, lr: float, weight_decay: float) -> None:
    """Decoupled weight decay (Loshchilov & Hutter, arXiv 1711.05101): `W ← W(1 − lr·λ)`.

    Args:
        param: W, any shape and floating dtype, changed in place.
        lr: learning rate η, before any scale of a group's part.
        weight_decay: λ.
    """
    if weight_decay:
        param.mul_(1 - lr * weight_decay)


def adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: float,
    lr: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Adam with bias correction (Kingma & Ba, arXiv 1412.6980); with `decay_` before it, `torch.optim.AdamW`.

    `m ← β₁m + (1 − β₁)g;  v ← β₂v + (1 − β₂)g²;  W ← W − lr/(1 − β₁ᵗ) · m / (√v/√(1 − β₂ᵗ) + ε)`

    The operations come in the order of torch's plain form, so that the results agree with it bit for bit.

    Args:
        param: W, changed in place.
        grad: g, the same shape, as are the next two.
        exp_avg: m, changed in place.
        exp_avg_sq: v, changed in place.
        step: t, 1 at the first update of these moments.
        lr: learning rate, already scaled.
        betas: (β₁, β₂).
        eps: ε, added after the bias correction.
    """
    beta1, beta2 = betas
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    root = (1 - beta2**step) ** 0.5
    param.addcdiv_(exp_avg, (exp_avg_sq.sqrt() / root).add_(eps), value=-(lr / (1 - beta1**step)))


def signsgd_(param: Tensor, grad: Tensor, *, lr: float) -> None:
    """The sign of the gradient (Bernstein et al., arXiv 1802.04434): `W ← W − lr·sign(g)`. Keeps no state.

    Args:
        param: W, changed in place.
        grad: g, the same shape.
        lr: learning rate, already scaled.
    """
    param.add_(grad.sign(), alpha=-lr)
