"""The tensors of a launch of `one_pass`, in tables that are made when a selection changes, and kept.

Only pointers to gradients change from step to step: they are compared with those of the last step, and copied if they
differ. Nothing waits for the GPU.
"""

from __future__ import annotations

import functools
import math
import operator
import warnings
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from adafrugal.optim.rules import MOMENTS, Rates
from adafrugal.optim.sharding.shards import local

_Base = torch._C.TensorBase  # its methods, mapped, take half of the time that comprehensions take
_grad, _grad_dtype = operator.attrgetter("grad"), operator.attrgetter("grad.dtype")
RULES = ("adamw", "lion", "sgdm", "signsgd", "sgd", "none")  # those that `one_pass` has


class Part(NamedTuple):
    """Entries of a parameter that lie together and are updated alike."""

    kind: Literal["free", "full", "rows", "columns"]  # by which rule; the last two: the state-full one on some lines
    begin: int  # entries of the parameter before these
    size: int
    first_moment: int = 0  # index of the first moment here within the whole moments
    slots: Tensor | None = None  # [lines], int32: of each line its place among the selected ones, or −1


class Member(NamedTuple):
    """A parameter in a table."""

    param: Tensor
    state: dict[str, Any] | None  # with moments and `step`; None without
    parts: Sequence[Part]
    number: int  # index among all parameters
    first: int  # index of the first entry here within the whole parameter


class Table:
    """Parameters of one device and one choice of dtypes, and their launch.

    Args:
        members: the parameters; each has a gradient.
        rule, rule_free: of `rules.STATE_FULL` and `rules.STATE_FREE`.
        stochastic: whether to round bfloat16 stochastically.
    """

    def __init__(self, members: Sequence[Member], rule: str, rule_free: str, stochastic: bool) -> None:
        from adafrugal.optim.kernels import one_pass

        self._step, self._rules, self._names = one_pass.step, (rule, rule_free), MOMENTS[rule]
        self._members = members  # whose slots the table points to
        self._params = [member.param for member in members]
        self._states = [member.state for member in members if member.state is not None]
        self._are_whole = not any(hasattr(param, "to_local") for param in self._params)
        weights = self._here(self._params)
        grads = [grad.contiguous() for grad in self._here([param.grad for param in self._params])]
        self._device = weights[0].device
        moment = self._states[0][self._names[0]] if self._states else weights[0]
        self._like = [tensor.new_empty(0) for tensor in (weights[0], grads[0], moment)]  # keeps no gradient alive
        self._own_steps = any(state["step"].ndim for state in self._states)
        self._steps = [state["step"] for state in self._states]
        if self._states and not self._own_steps:  # counts side by side, to be advanced by one operation
            self._steps = [torch.stack(self._steps)]
            for state, step in zip(self._states, self._steps[0], strict=True):
                state["step"] = step
        self._built_of = self._standing()
        self._shifts: list[tuple[int, int]] = []  # of each part: its parameter, bytes before it in the gradient
        owners: list[int] = []  # of each run of programs, the index of its part
        rows: list[list[int]] = []
        for index, (member, weight, grad) in enumerate(zip(members, weights, grads, strict=True)):
            for part in member.parts:
                self._shifts.append((index, part.begin * grad.element_size()))
                rows.append(_row(member, part, weight, self._names, len(owners) * one_pass.RUN))
                owners += [len(rows) - 1] * -(-part.size // (one_pass.BLOCK * one_pass.RUN))
        self._programs = len(owners) * one_pass.RUN
        self._table, self._owners = self._sent(rows), self._sent(owners, torch.int32)
        self._is_aligned = _are_aligned(n for row in rows for n in (*row[:3], row[_SIZE]))
        self._sent_pointers: list[int] = []
        self._options = {
            "OWN_STEPS": self._own_steps, "STOCHASTIC": stochastic,
            "BLOCK": one_pass.BLOCK, "RUN": one_pass.RUN, "num_warps": one_pass.WARPS,
        }  # fmt: skip

    def is_current(self) -> bool:
        """Return whether weights and moments are where and what they were, and gradients have their dtypes."""
        return self._standing() == self._built_of

    def launch(self, full: Rates, free: Rates, key: int) -> None:
        """Update the parameters, and count their steps; `key` is that of the noise (`rounding.noise_key`)."""
        grads = [*map(_grad, self._params)]
        grads = [*map(_Base.contiguous, self._here(grads))]  # copies live until the launch
        pointers = [*map(_Base.data_ptr, grads)]
        pointers = [pointers[index] + shift for index, shift in self._shifts]
        if pointers != self._sent_pointers:
            self._sent_pointers, self._grads = pointers, self._sent(pointers)
            self._options["ALIGNED"] = self._is_aligned and _are_aligned(pointers)
        with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
            if self._steps:
                torch._foreach_add_(self._steps, 1)
            if self._programs:
                self._step[(self._programs,)](
                    self._owners, self._table, self._grads, *self._like, full.lr, free.lr, 1 - full.decay,
                    *full.betas, *(1 - beta for beta in full.betas),
                    *(math.log(beta) if beta else -math.inf for beta in full.betas), full.eps, key,
                    *self._rules, **self._options,
                )  # fmt: skip

    def _here(self, tensors: list[Tensor]) -> list[Tensor]:
        return tensors if self._are_whole else [local(tensor) for tensor in tensors]

    def _standing(self) -> list[Any]:
        """Return pointers and properties of all tensors; of the gradients, whose pointers may change, the dtypes."""
        weights = self._here(self._params)
        moments = (map(operator.itemgetter(name), self._states) for name in self._names)
        return [
            [*map(_Base.data_ptr, weights)], [*map(_Base.is_contiguous, weights)], [*map(_grad_dtype, self._params)],
            *([*map(_Base.data_ptr, some)] for some in moments),
        ]  # fmt: skip

    def _sent(self, values: Sequence[Any], dtype: torch.dtype = torch.int64) -> Tensor:
        made = torch.tensor(values, dtype=dtype)
        return (made.pin_memory() if self._device.type == "cuda" else made).to(self._device, non_blocking=True)


_SIZE = 6  # column of the table


def _row(member: Member, part: Part, weight: Tensor, names: Sequence[str], first_tile: int) -> list[int]:
    """Return the values of `one_pass.COLUMNS` for a part."""
    from adafrugal.optim.kernels import one_pass

    has_state = part.kind != "free"
    moments = [member.state[name] for name in names] if has_state else []
    row = {
        "weight": weight.data_ptr() + part.begin * weight.element_size(),
        "steps": member.state["step"].data_ptr() if has_state else 0,
        "kind": one_pass.KINDS.index(part.kind),
        "size": part.size, "first_tile": first_tile, "number": member.number,
        "first_weight": member.first + part.begin, "first_moment": part.first_moment,
    }  # fmt: skip
    row |= zip(("exp_avg", "exp_avg_sq"), (moment.data_ptr() for moment in moments), strict=False)
    if part.slots is not None:
        row |= {"slots": part.slots.data_ptr(), "length": weight.shape[1], "width": moments[0].shape[1]}
    return [row.get(column, 0) for column in one_pass.COLUMNS]


def _are_aligned(numbers: Iterable[int]) -> bool:
    return functools.reduce(operator.or_, numbers, 0) % 16 == 0


# -- what can share a table, and where --------------------------------------------------------------------------------


def alike(members: Iterable[Member], names: Sequence[str]) -> list[list[Member]]:
    """Divide members into lists that can share a table."""
    found: dict[tuple[Any, ...], list[Member]] = {}
    for member in sorted(members, key=lambda member: member.state is None):
        weight = local(member.param)
        kind = weight.device, weight.dtype, member.param.grad.dtype
        if member.state is not None:
            kind += member.state[names[0]].dtype, member.state["step"].ndim > 0
        else:
            kind = next((other for other in found if other[:3] == kind), kind)
        found.setdefault(kind, []).append(member)
    return list(found.values())


def takes(weight: Tensor) -> bool:
    """Return whether a table can take a parameter's local part."""
    dtypes = torch.float32, torch.bfloat16, torch.float16
    return weight.dtype in dtypes and weight.layout == torch.strided and weight.is_contiguous()


@functools.cache
def work_on(device: torch.device) -> bool:
    """Return whether a launch works on this device, a GPU; try it, and warn if it does not."""
    if device.type != "cuda":
        return False
    param = torch.nn.Parameter(torch.zeros(16, device=device))
    param.grad = torch.ones_like(param)
    try:
        member = Member(param, None, [Part("free", 0, 16)], number=0, first=0)
        Table([member], "adamw", "signsgd", stochastic=False).launch(Rates(lr=0.0), Rates(lr=1.0), key=0)
        works = bool((param == -1).all())
        reason = f"it gives {param.tolist()}"
    except Exception as error:  # of any class: Triton is missing, or does not support the card, or has no C compiler
        works, reason = False, str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if not works:
        warnings.warn(f"Triton does not work here ({reason}); Frugal uses torch's own kernels, which take longer",
                      stacklevel=2)  # fmt: skip
    return works
