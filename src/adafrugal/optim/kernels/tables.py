"""The tensors of a launch of `one_pass`, in tables that are made when a selection changes, and kept.

Only pointers to gradients change from step to step: they are compared with those of the last step, and copied if they
differ. Nothing waits for the GPU.
"""

from __future__ import annotations

import functools
import math
import operator
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from adafrugal.optim import eight_bits
from adafrugal.optim.rules import MOMENTS, Rates
from adafrugal.optim.sharding.shards import local, local_grad
from adafrugal.optim.state import SCALES

_Base = torch._C.TensorBase  # its methods, mapped, take half of the time that comprehensions take
UNTRIED = "make one before with the same tensors; ask can_replay()"
_grad, _grad_dtype = operator.attrgetter("grad"), operator.attrgetter("grad.dtype")
RULES, RULES_FREE = ("adamw", "lion", "sgdm"), ("signsgd", "sgd", "none")  # those that `one_pass` has


class Part(NamedTuple):
    """Entries of a parameter that lie together, with a row of their own in the table."""

    kind: Literal["free", "full", "rows", "columns"]  # the rule; of the last two: by the line, rows or columns
    begin: int  # entries of the parameter before these
    size: int
    first_moment: int = 0  # index of the first moment here within the whole moments
    slots: Tensor | None = None  # int32: of each line its place among the selected ones, or −1; then these lines


class Member(NamedTuple):
    """A parameter in a table."""

    param: Tensor
    state: dict[str, Any] | None  # with moments and `step`; None without
    parts: Sequence[Part]
    number: int  # index among all parameters
    first: int  # index of the first entry here within the whole parameter


class Table:
    """Parameters of one device and one choice of dtypes, and their launch: one for all of them.

    Args:
        members: the parameters; each has a gradient.
        rule, rule_free: of `RULES` and `RULES_FREE`.
        stochastic: whether to round bfloat16 stochastically.
    """

    def __init__(self, members: Sequence[Member], rule: str, rule_free: str, stochastic: bool) -> None:
        from adafrugal.optim.kernels import one_pass

        self._rules, self._names = (rule, rule_free), MOMENTS[rule]
        self._members = members  # whose slots the table points to
        self._params = [member.param for member in members]
        self._with_state = [member.param for member in members if member.state is not None]
        self._states = [member.state for member in members if member.state is not None]
        self._are_whole = not any(hasattr(param, "to_local") for param in self._params)
        weights = self._here(self._params)
        grads = [local_grad(param).contiguous() for param in self._params]
        self._device = weights[0].device
        moment = self._states[0][self._names[0]] if self._states else weights[0]
        self._in_codes = bool(self._states) and not moment.dtype.is_floating_point  # of all: `alike`
        self._step = one_pass.step_codes if self._in_codes else one_pass.step
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
        rows: list[dict[str, int]] = []
        for index, (member, weight, grad) in enumerate(zip(members, weights, grads, strict=True)):
            for part in member.parts:
                self._shifts.append((index, part.begin * grad.element_size()))
                rows.append(_row(member, part, weight, self._names, len(owners) * one_pass.RUN))
                owners += [len(rows) - 1] * -(-_tiles(rows[-1], self._in_codes) // one_pass.RUN)
        self._programs = len(owners) * one_pass.RUN
        table = [[row.get(column, 0) for column in one_pass.COLUMNS] for row in rows]
        self._table, self._owners = _sent(table, self._device), _sent(owners, self._device, torch.int32)
        to_align = "weight", "exp_avg", "exp_avg_sq", "size", *(("length", "width") if self._in_codes else ())
        self._is_aligned = _are_aligned(row.get(name, 0) for row in rows for name in to_align)
        self._sent_pointers: list[int] = []
        self._options = {
            "OWN_STEPS": self._own_steps, "STOCHASTIC": stochastic,
            "BLOCK": one_pass.BLOCK, "RUN": one_pass.RUN, "num_warps": one_pass.WARPS,
        }  # fmt: skip

    def is_current(self, states: Mapping[Tensor, dict[str, Any]]) -> bool:
        """Return whether weights and states are where and what they were, and gradients have their dtypes."""
        if not all(map(operator.is_, map(states.get, self._with_state), self._states)):
            return False
        try:
            return self._standing() == self._built_of
        except KeyError:  # a moment is gone
            return False

    def launch(self, rates: Rates, lr_free: float, key: int) -> None:
        """Update the parameters, and count their steps.

        Args:
            rates: of the state-full rule; the decay is for all. Tensors of one entry are read on the device.
            lr_free: of the state-free rule.
            key: of the noise (`rounding.noise_key`).
        """
        if self._in_codes:
            refuse_to_record("moments in 8 bits would repeat their noise")
        grads = [*map(_grad, self._params)]
        grads = [*map(_Base.contiguous, self._here(grads))]  # copies live until the launch
        pointers = [*map(_Base.data_ptr, grads)]
        pointers = [pointers[index] + shift for index, shift in self._shifts]
        if pointers != self._sent_pointers:
            refuse_to_record("its gradients have moved, or are not contiguous; zero_grad(set_to_none=False) keeps them")
            self._sent_pointers, self._grads = pointers, _sent(pointers, self._device)
            self._options["ALIGNED"] = self._is_aligned and _are_aligned(pointers)
        with _on(self._device):
            if self._steps:
                torch._foreach_add_(self._steps, 1)
            if self._programs:
                self._step[(self._programs,)](
                    self._owners, self._table, self._grads, *self._like, rates.lr, lr_free, 1 - rates.decay,
                    *rates.betas, *(1 - beta for beta in rates.betas),
                    *(math.log(beta) if beta else -math.inf for beta in rates.betas), rates.eps, key,
                    *self._rules, ON_DEVICE=isinstance(rates.lr, Tensor), **self._options,
                )  # fmt: skip

    def _here(self, tensors: list[Tensor]) -> list[Tensor]:
        return tensors if self._are_whole else [local(tensor) for tensor in tensors]

    def _standing(self) -> list[Any]:
        """Return pointers and properties of all tensors; of the gradients, whose pointers may change, the dtypes."""
        weights = self._here(self._params)
        names = (*self._names, *(map(SCALES.__getitem__, self._names) if self._in_codes else ()), "step")
        kept = (map(operator.itemgetter(name), self._states) for name in names)
        return [
            [*map(_Base.data_ptr, weights)], [*map(_Base.numel, weights)], [*map(_Base.is_contiguous, weights)],
            [*map(_grad_dtype, self._params)], *([*map(_Base.data_ptr, some)] for some in kept),
        ]  # fmt: skip


def _row(member: Member, part: Part, weight: Tensor, names: Sequence[str], first_tile: int) -> dict[str, int]:
    """Return the values of `one_pass.COLUMNS` for a part; those that are absent are 0."""
    from adafrugal.optim.kernels import one_pass

    state = None if part.kind == "free" else member.state
    moments = [state[name] for name in names] if state else []
    scales = [state[SCALES[name]] for name in names if SCALES[name] in state] if state else []
    length = eight_bits.rows_of(moments[0].shape)[1] if moments else part.size
    row = {
        "weight": weight.data_ptr() + part.begin * weight.element_size(),
        "steps": state["step"].data_ptr() if state else 0,
        "kind": one_pass.KINDS.index(part.kind),
        "size": part.size, "first_tile": first_tile, "number": member.number,
        "first_weight": member.first + part.begin, "first_moment": part.first_moment,
        "length": length, "width": length,
    }  # fmt: skip
    row |= zip(("exp_avg", "exp_avg_sq"), (moment.data_ptr() for moment in moments), strict=False)
    row |= zip(("scale", "scale_sq"), (scale.data_ptr() for scale in scales), strict=False)
    if part.slots is not None:
        row |= {"slots": part.slots.data_ptr(), "length": weight.shape[1]}
    return row


def _tiles(row: Mapping[str, int], in_codes: bool) -> int:
    """Return the number of a part's tiles: of its entries, or of the groups of its moments that share a scale."""
    from adafrugal.optim.kernels import one_pass

    if not in_codes or not row["size"]:
        return -(-row["size"] // one_pass.BLOCK)
    groups = row["size"] // row["length"] * -(-row["width"] // eight_bits.BLOCK)
    return -(-groups // (one_pass.BLOCK // eight_bits.BLOCK))


def _are_aligned(numbers: Iterable[int]) -> bool:
    return functools.reduce(operator.or_, numbers, 0) % 16 == 0


def close_batch(weights: Sequence[Tensor], rest: Tensor, moved: Tensor, rule_free: str, rates: Rates) -> None:
    """Update matrices of one shape in one launch of `one_pass.close`; `rest` and `moved` are [b, n_out, n_in]."""
    from adafrugal.optim.kernels import one_pass

    device, size = rest.device, weights[0].numel()
    pointers, tiles = _sent([weight.data_ptr() for weight in weights], device), -(-size // one_pass.BLOCK)
    with _on(device):
        one_pass.close[(tiles * len(weights),)](
            pointers, rest, moved, tiles, size, rates.lr, 1 - rates.decay,
            rule_free, BLOCK=one_pass.BLOCK, num_warps=one_pass.WARPS,
        )  # fmt: skip


def _on(device: torch.device) -> AbstractContextManager[None]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _sent(values: Sequence[int | list[int]], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    made = torch.tensor(values, dtype=dtype, device="cpu")
    return (made.pin_memory() if device.type == "cuda" else made).to(device, non_blocking=True)


def is_recording() -> bool:
    """Return whether a CUDA graph is being recorded on the current stream."""
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return in_use and torch.cuda.is_current_stream_capturing()


def refuse_to_record(why: str) -> None:
    """Raise a RuntimeError if a CUDA graph is being recorded."""
    if is_recording():
        raise RuntimeError(f"a CUDA graph cannot record this step of Frugal: {why}")


# -- what can share a table, and where --------------------------------------------------------------------------------


def alike(members: Iterable[Member], names: Sequence[str]) -> list[list[Member]]:
    """Divide members into lists that can share a table."""
    found: dict[tuple[Any, ...], list[Member]] = {}
    for member in sorted(members, key=lambda member: member.state is None):
        weight = local(member.param)
        kind: tuple[Any, ...] = weight.device, weight.dtype, local_grad(member.param).dtype
        if member.state is not None:
            kind += member.state[names[0]].dtype, member.state["step"].ndim > 0
        else:
            kind = next((other for other in found if other[:3] == kind), kind)
        found.setdefault(kind, []).append(member)
    return list(found.values())


def takes(weight: Tensor) -> bool:
    """Return whether a table can take a parameter's local part."""
    is_plain = type(weight) in (Tensor, Parameter) and weight.layout == torch.strided and weight.is_contiguous()
    dtypes = torch.float32, torch.bfloat16, torch.float16
    return is_plain and weight.dtype in dtypes and work_on(weight.device)


@functools.cache
def work_on(device: torch.device) -> bool:
    """Return whether a launch works on this device, a GPU: try it once, and warn if it does not."""
    if device.type != "cuda":
        return False
    refuse_to_record(UNTRIED)  # raised, thus not cached
    try:
        reason = _tried(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of any class: Triton is missing, or there is no C compiler
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
    if reason:
        what = f"Triton does not work here ({reason}); Frugal uses torch's own kernels, which take longer"
        warnings.warn(what, stacklevel=2)
    return not reason


def _tried(device: torch.device) -> str:
    """Return why a launch does not work, or nothing."""
    if torch.version.cuda and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than Ampere"
    param = Parameter(torch.zeros(16, dtype=torch.float32, device=device))
    param.grad = torch.ones_like(param)
    member = Member(param, None, [Part("free", 0, 16)], number=0, first=0)
    Table([member], "adamw", "signsgd", stochastic=False).launch(Rates(lr=0.0), lr_free=1.0, key=0)
    return "" if bool((param == -1).all()) else "a trial gives wrong numbers"
