"""Which gradients there are, and checks before a step with one result on all processes that share a parameter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from adafrugal.optim.options import Group, parameter_names
from adafrugal.optim.sharding.shards import agreed, local_grad


def places(group: Group) -> list[int]:
    """Return the indices of a group's parameters that have a gradient."""
    return [place for place, param in enumerate(group["params"]) if param.grad is not None]


def refuse_sparse(params: Iterable[Tensor], optimizer: str = "Frugal") -> None:
    """Raise a ValueError, which names the optimizer, if one of these parameters has a sparse gradient."""
    if any(param.grad is not None and param.grad.layout != torch.strided for param in params):
        raise ValueError(f"{optimizer} takes no sparse gradients; make the embedding with sparse=False")


def are_of_no_step(groups: Sequence[Group]) -> bool:
    """Return whether a step is none of training, but torch.distributed.checkpoint's to initialise the state.

    It is made before the first, with learning rates of 0 and gradients of zeros on all processes. Only then are
    gradients looked at, which makes the host wait for a GPU.
    """
    if any(group["steps"] or group["skipped_steps"] or group["lr"] for group in groups):
        return False
    params = [param for group in groups for param in group["params"] if param.grad is not None]
    refuse_sparse(params)
    are_zero = not any(bool(local_grad(param).any()) for param in params)
    return bool(params) and all(agreed([are_zero] * len(params), params))


def are_sound(groups: Sequence[Group], nonfinite: str | None) -> bool:
    """Return whether the present gradients allow a step; False means skip it.

    Raises:
        ValueError: a gradient is sparse.
        FloatingPointError: a gradient is not finite, and `nonfinite` is "error".
    """
    params = [param for group in groups for param in group["params"] if param.grad is not None]
    refuse_sparse(params)
    if nonfinite is None:
        return True
    grads = [grad for param in params if (grad := local_grad(param)).numel()]
    finite = not grads or bool(torch.nn.utils.get_total_norm(grads, float("inf")).isfinite())
    if all(agreed([finite] * len(params), params)):
        return True
    if nonfinite == "skip":
        return False
    names = {p: name for group in groups for name, p in zip(parameter_names(group), group["params"], strict=True)}
    each = agreed([bool(local_grad(param).isfinite().all()) for param in params], params)
    name = next((names[param] for param, is_so in zip(params, each, strict=True) if not is_so), "on another process")
    raise FloatingPointError(
        f"the gradient of parameter {name} is not finite at step {groups[0]['steps'] + 1}; nothing was changed "
        "(nonfinite='skip' would go on without this step)"
    )
