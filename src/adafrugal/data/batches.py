"""Batches are a pure function of seed, step and index in the batch, so that a resumed run has nothing to skip."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adafrugal.data.rows import IGNORED, Layout, Rows, Window, joined
from adafrugal.data.tokens.encoding import Shard
from adafrugal.data.tokens.windows import Windows
from adafrugal.system.errors import SettingError

AHEAD = 2  # steps whose batches are made before they are wanted


@dataclass(frozen=True)
class Batch:
    """Rows of tokens and what follows each of them.

    Args:
        tokens: int64 [rows, length].
        targets: int64 [rows, length], the token after each; `IGNORED` where there is none to predict.
        real: int64 [rows], how many tokens of each row are no padding.
        positions: int64 [rows, length], counted anew in each document, where attention must stay within one;
            None where it need not.
    """

    tokens: Tensor
    targets: Tensor
    real: Tensor
    positions: Tensor | None = None

    @classmethod
    def of(cls, rows: Rows) -> Batch:
        """The rows as tensors that share their memory."""
        return cls(*(None if column is None else torch.from_numpy(column) for column in rows))

    def count(self) -> int:
        """The number of targets that count."""
        return self._sums[0]

    def real_tokens(self) -> int:
        """The number of tokens that are no padding."""
        return self._sums[1]

    def split(self, rows: int) -> Iterator[Batch]:
        """The batch in parts of at most `rows` rows."""
        for begin in range(0, len(self.tokens), rows):
            yield self._slice(begin, begin + rows)

    def filled(self, rows: int) -> Batch:
        """Add copies of the first row up to `rows` rows; their targets are `IGNORED` and they have no real token."""
        there = len(self.tokens)
        if there == rows:
            return self
        places = torch.arange(rows)
        batch = self._each(lambda tensor: tensor[torch.where(places < there, places, 0)])
        batch.targets[there:], batch.real[there:] = IGNORED, 0
        return batch

    def share(self, rank: int, size: int) -> Batch:
        """The neighbouring rows that one of `size` processes takes: as many as any other, after filling up."""
        if size == 1:
            return self
        each = -(-len(self.tokens) // size)
        return self.filled(each * size)._slice(rank * each, (rank + 1) * each)

    def ready(self, pin: bool) -> Batch:
        """Compute ahead what a step asks for: the sums, and copies in pinned memory if `pin`."""
        batch = self._each(lambda tensor: tensor.pin_memory()) if pin else self
        batch.count()  # and `real_tokens`; both are kept
        return batch

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; a GPU copies from pinned memory, without waiting."""
        if device.type != "cuda":
            return self
        pinned = self._each(lambda tensor: tensor if tensor.is_pinned() else tensor.pin_memory())
        return pinned._each(lambda tensor: tensor.to(device, non_blocking=True))

    @cached_property
    def _sums(self) -> tuple[int, int]:
        """The targets that count and the real tokens; by numpy, which starts no threads."""
        return int(np.count_nonzero(self.targets.numpy() != IGNORED)), int(self.real.numpy().sum())

    def _slice(self, begin: int, stop: int) -> Batch:
        """Views of some rows, which are pinned where the batch is."""
        return self._each(lambda tensor: tensor[begin:stop])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        tensors = self.tokens, self.targets, self.real, self.positions
        return Batch(*(None if tensor is None else change(tensor) for tensor in tensors))


class TrainingBatches:
    """The batch of each step, in an order that is shuffled within windows, anew in every epoch.

    Args:
        windows: of the training part.
        layout: of its rows.
        seed: of the order.
        batch_size: rows per step, over all devices and micro-batches.
        steps: how many the run wants.
        repeat: whether a run longer than the text may read it again.
        state: where to begin, as `state` gave it; the beginning of the text where there is none.

    Raises:
        SettingError: in any method: the text is too short for the run and must not repeat, as soon as that is known.
    """

    def __init__(
        self,
        windows: Windows,
        layout: Layout,
        seed: int,
        batch_size: int,
        steps: int,
        repeat: bool,
        state: dict[str, Any] | None = None,
    ) -> None:
        self._windows, self._layout = windows, layout
        self._seed, self._batch_size, self._steps, self._repeat = seed, batch_size, steps, repeat
        turn, first = (state["turn"], state["first_row"]) if state else (0, 0)
        self._turn, self._firsts = turn, {turn: first}  # turn -> the number of its first row
        self._open: tuple[int, Window, np.ndarray] | None = None  # turn, window, its places as they are read
        self._refuse_a_short_text()

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step; the first is step 1."""
        self._refuse_a_short_text()
        number, stop = (step - 1) * self._batch_size, step * self._batch_size
        parts: list[Rows] = []
        while number < stop:
            window, order = self._enter(number)
            first = self._firsts[self._turn]
            parts.append(window.take(order[number - first : stop - first]))
            number += len(parts[-1].tokens)
        return Batch.of(joined(parts))

    def state(self) -> dict[str, Any]:
        """Plain values from which another process goes on with the step after the one that was made last."""
        return {"turn": self._turn, "first_row": self._firsts[self._turn], **self._windows.state(self._turn)}

    def epochs(self, steps: int) -> float | None:
        """How often the text has been read after so many steps; None while nobody knows how long it is."""
        total = self._windows.total()
        return steps * self._batch_size / total if total else None

    def first_window(self) -> Window:
        """The shards that are read first."""
        self._rows(0)
        return self._windows.open(0)

    def _enter(self, number: int) -> tuple[Window, np.ndarray]:
        """Make the turn that has row `number` the current one; its window, and its places in the order of reading."""
        if number < self._firsts[self._turn]:
            self._turn = min(self._firsts)
        while number >= (after := self._firsts[self._turn] + self._rows(self._turn)):
            self._turn += 1
            self._firsts[self._turn] = after
        if self._open is None or self._open[0] != self._turn:
            window = self._windows.open(self._turn)
            self._open = self._turn, window, permutation(window.rows, key=f"{self._seed}/{self._turn}")
        return self._open[1:]

    def _rows(self, turn: int) -> int:
        """The number of rows of a turn."""
        if self._open is not None and self._open[0] == turn:
            return self._open[1].rows
        rows = self._windows.rows(turn)
        if rows is None:
            self._refuse_a_short_text()
            raise SettingError("the training part has not one row; see data.source and trainer.sequence_length")
        return rows

    def _refuse_a_short_text(self) -> None:
        total, wanted = self._windows.total(), self._steps * self._batch_size
        if total is None or (total and (self._repeat or wanted <= total)):
            return
        if not total:
            raise SettingError(
                f"the training part of the text has not one row of trainer.sequence_length ({self._layout.length}) "
                "tokens; shorten the sequence, or see what data.source reads"
            )
        raise SettingError(
            f"trainer.steps is {self._steps}: that takes {wanted:,} rows and there are {total:,}, since "
            f"{self._windows.why_short()}; allowed: up to {total // self._batch_size:,} steps, or data.repeat=true"
        )


class Prefetched:
    """Training batches made in a thread, before they are wanted.

    Args:
        batches: that are made.
        last: the step after which there are none.
        state: of the batches, before the first is wanted.
        pin: put the batches into pinned memory, from which a GPU copies without waiting.
    """

    def __init__(
        self, batches: TrainingBatches, last: int, state: dict[str, Any] | None = None, pin: bool = False
    ) -> None:
        self._batches, self._last, self._pin = batches, last, pin
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: dict[int, Future[tuple[Batch, dict[str, Any]]]] = {}
        self.state = state or {}  # from which the step after the last batch is read

    def is_ready(self, step: int, timeout: float) -> bool:
        """Whether a step's batch is made, or cannot be made, after at most `timeout` seconds of waiting for it."""
        try:
            self._future(step).exception(timeout)
        except NotYet:
            return False
        return True

    def __call__(self, step: int) -> Batch:
        """The batch of a step; steps after it are begun."""
        batch, self.state = self._future(step).result()
        self._ahead = {number: future for number, future in self._ahead.items() if number > step}
        return batch

    def close(self) -> None:
        """Make no more."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _future(self, step: int) -> Future[tuple[Batch, dict[str, Any]]]:
        for number in range(step, max(step, min(step + AHEAD, self._last)) + 1):
            if number not in self._ahead:
                self._ahead[number] = self._pool.submit(self._make, number)
        return self._ahead[step]

    def _make(self, step: int) -> tuple[Batch, dict[str, Any]]:
        return self._batches[step].ready(self._pin), self._batches.state()


def permutation(size: int, key: str) -> np.ndarray:
    """A pseudo-random permutation of `range(size)`, int64 [size].

    Each place goes through a Feistel network on the smallest even number of bits that covers `size`. A place that
    falls outside goes through it again until it falls inside (Black & Rogaway, "Ciphers with arbitrary finite domains",
    2002).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    mixed = _mixed(half, key)
    places = np.arange(size)
    outside = places.copy()
    while len(outside):
        left, right = places[outside] >> half, places[outside] & mask
        for mix in mixed:
            left, right = right, left ^ mix[right]
        places[outside] = left << half | right
        outside = outside[places[outside] >= size]
    return places


def _mixed(half: int, key: str) -> np.ndarray:
    """What each of the four rounds of a Feistel network makes of each value of `half` bits, int64 [4, 2 ** half]."""
    values = [value.to_bytes(8, "little") for value in range(1 << half)]
    keys = [f"{key}/{number}".encode() for number in range(4)]
    digests = b"".join(hashlib.blake2b(value, digest_size=8, key=k).digest() for k in keys for value in values)
    return (np.frombuffer(digests, dtype="<u8") & ((1 << half) - 1)).astype(np.int64).reshape(4, -1)


@dataclass(frozen=True)
class Validation:
    """The rows of every evaluation.

    Args:
        batches: in order, all with the same number of rows; what fills up the last has no target that counts.
        tokens: targets that count.
        text_bytes: of UTF-8 that these targets stand for.
    """

    batches: list[Batch]
    tokens: int
    text_bytes: int


def validation(shards: Sequence[Shard], layout: Layout, tokens: int, batch_size: int) -> Validation:
    """The same rows at every evaluation: about `tokens` tokens that are no padding, spread evenly over the shards.

    Only the first shards that hold so many are used, so that the rows do not depend on what else is prepared.

    Raises:
        SettingError: there is not one row.
    """
    used: list[Shard] = []
    there = 0
    for shard in shards:
        used.append(shard)
        there += layout.real_tokens(shard)
        if there >= tokens:
            break
    window = Window(used, layout)
    if not window.rows:
        raise SettingError(
            f"the validation part of the text has not one row of trainer.sequence_length ({layout.length}) tokens; "
            "shorten the sequence, set data.validation_split, or raise data.held_out (and where the text is a few long "
            "documents, see data.sample_by)"
        )
    wanted = min(window.rows, max(1, window.rows * tokens // there))
    places = np.arange(wanted) * window.rows // wanted
    parts = (window.take(places[i : i + batch_size]) for i in range(0, wanted, batch_size))
    batches = [Batch.of(part).filled(batch_size) for part in parts]
    return Validation(batches, sum(b.count() for b in batches), window.target_bytes(places))
