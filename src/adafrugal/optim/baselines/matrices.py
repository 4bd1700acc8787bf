"""The base of the optimizers here: matrices, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from adafrugal.optim import choices, gradients, options
from adafrugal.optim.sharding import shards
from adafrugal.optim.values import as_plain

_DTYPES = torch.float32, torch.float64, torch.bfloat16


class Matrices(torch.optim.Optimizer):
    """A base that updates matrices only, each by its own gradient and state.

    They are float32, float64 or bfloat16, and updated in their dtype. A step checks all gradients and states before it
    moves the first matrix.

    Raises:
        ValueError: a parameter is not a whole matrix in one of these dtypes, an option is out of its range, or a key of
            a group is misspelt.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of matrices, unless it is refused."""
        options.refuse_misspelt(param_group, self.defaults.keys())
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for name in self._options():
                group[name] = as_plain(group[name])
                options.refuse(name, group[name], choices.allowed(name, group[name]) if name != "seed" else None)
            for param in group["params"]:
                self._refuse_parameter(param)
        except Exception:
            del self.param_groups[-1]
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update each matrix that has a gradient; return the closure's loss, if one is given.

        Raises:
            ValueError: a gradient is sparse, or a state does not go with its group's options; nothing has been changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        all_of_them = enumerate((param, group) for group in self.param_groups for param in group["params"])
        due = [(place, *each) for place, each in all_of_them if each[0].grad is not None and each[0].numel()]
        gradients.refuse_sparse([param for _, param, _ in due], type(self).__name__)
        for _, param, group in due:
            self._refuse_state(self.state.get(param, {}), param, group)
        for place, param, group in due:
            grad = param.grad.to(param.dtype)
            lr, decay = float(group["lr"]), group["weight_decay"]
            direction = self._direction(grad, self.state[param], group, place)
            if decay:
                param.mul_(1 - lr * decay)
            param.add_(direction, alpha=-lr)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a saved state.

        Raises:
            ValueError: it is of another optimizer, or does not suit these matrices; nothing has been changed.
        """
        handle = self.register_load_state_dict_pre_hook(lambda _, saved: self._refuse_saved(saved))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def _direction(self, grad: Tensor, state: dict[str, Any], group: dict[str, Any], place: int) -> Tensor:
        """Return D [n_out, n_in], by which `W ← W(1 − η·λ) − η·D`, and change the state.

        Args:
            grad: G [n_out, n_in], in the dtype of W.
            state: of the matrix, empty at first.
            group: its options.
            place: index of the matrix among all.
        """
        raise NotImplementedError

    def _kept(self, shape: torch.Size, group: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor in the state of a matrix, once it has one."""
        raise NotImplementedError

    # -- checks ---------------------------------------------------------------------------------------------------

    def _options(self) -> list[str]:
        return [name for name in self.defaults if name != "differentiable"]  # which torch adds to a copy's defaults

    def _refuse_parameter(self, param: Tensor) -> None:
        what = f"{type(self).__name__} is given a tensor"
        if param.ndim != 2:
            raise ValueError(f"{what} of shape {list(param.shape)}; allowed: matrices [n_out, n_in]")
        if shards.is_sharded(param):
            raise ValueError(f"{what} that is sharded over processes; allowed: whole matrices")
        if param.dtype not in _DTYPES:  # in float16 ε = 1e-8 is 0
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
            given = str(param.dtype).removeprefix("torch.")
            raise ValueError(f"{what} in {given}; allowed: {known}; for float16 keep float32 weights and use autocast")

    def _refuse_saved(self, saved: Mapping[str, Any]) -> None:
        for ours, theirs in zip(self.param_groups, saved["param_groups"], strict=False):  # torch compares the numbers
            if lacking := [name for name in self._options() if name not in theirs]:
                what = f"the saved state is of another optimizer than {type(self).__name__}"
                raise ValueError(f"{what}: its groups have no {', '.join(lacking)}; load one that this class saved")
            for param, key in zip(ours["params"], theirs["params"], strict=False):
                self._refuse_state(saved["state"].get(key, {}), param, theirs)

    def _refuse_state(self, state: Mapping[str, Any], param: Tensor, group: Mapping[str, Any]) -> None:
        for name, shape in self._kept(param.shape, group).items() if state else ():
            value = state.get(name)
            if value is None or value.shape != shape:
                found = f"no {name}" if value is None else f"{name} of shape {list(value.shape)}"
                needed = f"{type(self).__name__} with its group's options needs {list(shape)}"
                what = f"the state of a matrix {list(param.shape)} has {found}, and {needed}"
                raise ValueError(f"{what}: give the options with which it began, or begin with an empty state")
