"""Batches as a pure function of (seed, step, index in the batch): nothing to save, nothing to skip on a resume."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adafrugal.config import SettingError

IGNORED = -100  # a target that is not counted; torch's own default


@dataclass(frozen=True)
class Batch:
    """Rows of tokens and what follows each of them.

    Args:
        tokens: int64 [rows, length].
        targets: int64 [rows, length], the token after each; `IGNORED` where there is none to predict.
    """

    tokens: Tensor
    targets: Tensor

    def count(self) -> int:
        """The number of targets that count."""
        return int((self.targets != IGNORED).sum())

    def split(self, rows: int) -> Iterator[Batch]:
        """The batch in parts of at most `rows` rows."""
        for tokens, targets in zip(self.tokens.split(rows), self.targets.split(rows), strict=True):
            yield Batch(tokens, targets)

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; from pinned memory without waiting where that is a GPU."""
        if device.type == "cuda":
            return Batch(*(t.pin_memory().to(device, non_blocking=True) for t in (self.tokens, self.targets)))
        return self


class PackedRows:
    """A stream of tokens cut into rows of `length`; row i predicts tokens i·length + 1 … (i + 1)·length.

    Raises:
        SettingError: there is not one whole row.
    """

    def __init__(self, tokens: np.ndarray, length: int) -> None:
        self.count = (len(tokens) - 1) // length
        if self.count < 1:
            raise SettingError(
                f"trainer.sequence_length is {length}, but the text has {len(tokens)} tokens; shorten the sequence"
            )
        self._tokens = tokens
        self._length = length

    def batch(self, rows: list[int]) -> Batch:
        """Some rows, by number."""
        starts = [row * self._length for row in rows]
        spans = np.stack([self._tokens[s : s + self._length + 1] for s in starts]).astype(np.int64)
        both = torch.from_numpy(spans)
        return Batch(both[:, :-1].contiguous(), both[:, 1:].contiguous())


class TrainingBatches:
    """The batch of each step, in an order that is reshuffled in every epoch.

    Args:
        rows: the training rows.
        seed: of the order.
        batch_size: rows per step, over all devices and micro-batches.
        steps: how many the run wants.
        repeat: whether a run longer than the text may read it again.

    Raises:
        SettingError: the text is too short for the run and must not repeat.
    """

    def __init__(self, rows: PackedRows, seed: int, batch_size: int, steps: int, repeat: bool) -> None:
        if not repeat and steps * batch_size > rows.count:
            raise SettingError(
                f"trainer.steps is {steps}: that takes {steps * batch_size:,} rows and the text has {rows.count:,}; "
                f"allowed: up to {rows.count // batch_size:,} steps, or data.repeat=true"
            )
        self._rows, self._seed, self._batch_size = rows, seed, batch_size

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step; the first is step 1."""
        first = (step - 1) * self._batch_size
        return self._rows.batch([self._row(first + index) for index in range(self._batch_size)])

    def epochs(self, steps: int) -> float:
        """How often the text has been read after so many steps."""
        return steps * self._batch_size / self._rows.count

    def _row(self, number: int) -> int:
        epoch, place = divmod(number, self._rows.count)
        return permuted(place, self._rows.count, key=f"{self._seed}/{epoch}")


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


def validation_batches(rows: PackedRows, tokens: int, length: int, batch_size: int) -> list[Batch]:
    """The same rows at every evaluation: about `tokens` tokens, spread evenly over the held-out part."""
    wanted = min(rows.count, max(1, tokens // length))
    numbers = [i * rows.count // wanted for i in range(wanted)]
    return [rows.batch(numbers[i : i + batch_size]) for i in range(0, len(numbers), batch_size)]
