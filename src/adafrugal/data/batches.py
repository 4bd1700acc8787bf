"""Batches as a pure function of (seed, step, index in the batch): nothing to skip on a resume."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adafrugal.config import SettingError
from adafrugal.data.rows import IGNORED, Layout, Row, Window
from adafrugal.data.shards import Shard
from adafrugal.data.windows import Windows

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

    def count(self) -> int:
        """The number of targets that count."""
        return int((self.targets != IGNORED).sum())

    def real_tokens(self) -> int:
        """The number of tokens that are no padding."""
        return int(self.real.sum())

    def split(self, rows: int) -> Iterator[Batch]:
        """The batch in parts of at most `rows` rows."""
        for begin in range(0, len(self.tokens), rows):
            yield Batch(*(None if t is None else t[begin : begin + rows] for t in self._tensors()))

    def share(self, rank: int, size: int) -> Batch:
        """The rows that one of `size` processes takes: neighbours, as many as any other takes.

        Where they do not come out even, the first row fills a place, and none of its targets counts.
        """
        if size == 1:
            return self
        each = -(-len(self.tokens) // size)
        places = torch.arange(rank * each, (rank + 1) * each)
        fills = places >= len(self.tokens)
        tokens, targets, real, positions = (
            None if t is None else t[places.masked_fill(fills, 0)] for t in self._tensors()
        )
        targets[fills], real[fills] = IGNORED, 0
        return Batch(tokens, targets, real, positions)

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; from pinned memory without waiting where that is a GPU."""
        if device.type != "cuda":
            return self
        there = (None if t is None else t.pin_memory().to(device, non_blocking=True) for t in self._tensors())
        return Batch(*there)

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        return self.tokens, self.targets, self.real, self.positions


def stacked(rows: Sequence[Row], masked: bool) -> Batch:
    """Rows as a batch, with positions where attention is masked across documents."""
    tokens, targets, positions = (
        torch.from_numpy(np.stack([getattr(row, name) for row in rows])) for name in ("tokens", "targets", "positions")
    )
    return Batch(tokens, targets, torch.tensor([row.real for row in rows]), positions if masked else None)


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
        self._open: tuple[int, Window] | None = None
        self._refuse_a_short_text()

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step; the first is step 1."""
        self._refuse_a_short_text()
        first = (step - 1) * self._batch_size
        rows = [self._row(first + index) for index in range(self._batch_size)]
        return stacked(rows, self._layout.masked)

    def state(self) -> dict[str, Any]:
        """Plain values from which another process goes on with the step after the one that was made last."""
        return {"turn": self._turn, "first_row": self._firsts[self._turn], **self._windows.state(self._turn)}

    def epochs(self, steps: int) -> float | None:
        """How often the text has been read after so many steps; None while nobody knows how long it is."""
        total = self._windows.total()
        return steps * self._batch_size / total if total else None

    def first_window(self) -> Window:
        """The shards that are read first."""
        self._window(0)
        return self._windows.open(0)

    def _row(self, number: int) -> Row:
        if number < self._firsts[self._turn]:
            self._turn = min(self._firsts)
        while number >= self._firsts[self._turn] + (rows := self._window(self._turn)):
            self._firsts[self._turn + 1] = self._firsts[self._turn] + rows
            self._turn += 1
        if self._open is None or self._open[0] != self._turn:
            self._open = (self._turn, self._windows.open(self._turn))
        place = permuted(number - self._firsts[self._turn], rows, key=f"{self._seed}/{self._turn}")
        return self._open[1].row(place)

    def _window(self, turn: int) -> int:
        """The rows of a turn."""
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
    """

    def __init__(self, batches: TrainingBatches, last: int, state: dict[str, Any] | None = None) -> None:
        self._batches, self._last = batches, last
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
        return self._batches[step], self._batches.state()


def permuted(place: int, size: int, key: str) -> int:
    """Where a pseudo-random permutation of `range(size)` sends `place`; needs no memory.

    A Feistel network on the smallest even number of bits that covers `size`; what falls outside is sent on until it
    falls inside (Black & Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = place >> half, place & mask
        for turn in range(4):
            left, right = right, left ^ (_mix(right, turn, key) & mask)
        place = left << half | right
        if place < size:
            return place


def _mix(value: int, turn: int, key: str) -> int:
    digest = hashlib.blake2b(value.to_bytes(8, "little"), digest_size=8, key=f"{key}/{turn}".encode()).digest()
    return int.from_bytes(digest, "little")


@dataclass(frozen=True)
class Validation:
    """The rows of every evaluation.

    Args:
        batches: in order.
        tokens: targets in them.
        text_bytes: of UTF-8 that the targets stand for.
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
    rows = [window.row(i * window.rows // wanted) for i in range(wanted)]
    batches = [stacked(rows[i : i + batch_size], layout.masked) for i in range(0, len(rows), batch_size)]
    return Validation(batches, sum(b.count() for b in batches), sum(row.target_bytes for row in rows))
