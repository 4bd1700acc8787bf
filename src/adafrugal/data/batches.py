"""The batch of each step: a pure function of seed, step and index in the batch, so that a resumed run skips nothing."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass

import numpy as np

from adafrugal.data.rows import IGNORED, Batch, Layout, Window
from adafrugal.data.tokens.encoding import Shard
from adafrugal.data.tokens.windows import Windows
from adafrugal.system.errors import SettingError

AHEAD = 2  # steps whose batches are made before they are wanted


class TrainingBatches:
    """The batch of each step, in an order that is shuffled within windows, anew in every epoch.

    Args:
        windows: of the training split.
        layout: of its rows.
        seed: of the order.
        batch_size: rows per step, over all devices and micro-batches.
        steps: how many the run wants.
        repeat: whether a run longer than the text may read it again.

    Raises:
        SettingError: in any method: the text is too short for the run and must not repeat, as soon as that is known.
    """

    def __init__(self, windows: Windows, layout: Layout, seed: int, batch_size: int, steps: int, repeat: bool) -> None:
        self._windows, self._layout = windows, layout
        self._seed, self._batch_size, self._steps, self._repeat = seed, batch_size, steps, repeat
        self._begins = [0]  # the first row of each window, over all epochs, as far as they are known
        self._open: tuple[int, Window, np.ndarray] | None = None  # its number, it, its rows as they are read
        self._refuse_a_short_text()

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step; the first is step 1."""
        self._refuse_a_short_text()
        row, stop = (step - 1) * self._batch_size, step * self._batch_size
        found: list[Batch] = []
        while row < stop:
            while row >= self._begins[-1]:
                self._begins.append(self._begins[-1] + self._rows(len(self._begins) - 1))
            number = bisect_right(self._begins, row) - 1
            if self._open is None or self._open[0] != number:
                window = self._windows.open(number)
                self._open = number, window, permutation(window.rows, key=f"{self._seed}/{number}")
            _, window, order = self._open
            first = self._begins[number]
            found.append(window.take(order[row - first : stop - first]))
            row += len(found[-1].tokens)
        return Batch.joined(found)

    def epochs(self, steps: int) -> float | None:
        """How often the text has been read after so many steps; None while its length is not known."""
        total = self._windows.total()
        return steps * self._batch_size / total if total else None

    def first_window(self) -> Window:
        """The window that is read first."""
        self._rows(0)
        return self._windows.open(0)

    def _rows(self, number: int) -> int:
        rows = self._windows.rows(number)
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
        pin: put the batches into pinned memory, from which a GPU copies without waiting.
    """

    def __init__(self, batches: TrainingBatches, last: int, pin: bool = False) -> None:
        self._batches, self._last, self._pin = batches, last, pin
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: dict[int, Future[Batch]] = {}

    def is_ready(self, step: int, timeout: float) -> bool:
        """Whether a step's batch is made, or cannot be made, after at most `timeout` seconds of waiting for it."""
        try:
            self._future(step).exception(timeout)
        except NotYet:
            return False
        return True

    def __call__(self, step: int) -> Batch:
        """The batch of a step; those of the next steps are begun."""
        batch = self._future(step).result()
        self._ahead = {number: future for number, future in self._ahead.items() if number > step}
        return batch

    def close(self) -> None:
        """Make no more."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _future(self, step: int) -> Future[Batch]:
        for number in range(step, max(step, min(step + AHEAD, self._last)) + 1):
            if number not in self._ahead:
                self._ahead[number] = self._pool.submit(lambda n=number: self._batches[n].ready(self._pin))
        return self._ahead[step]


def permutation(size: int, key: str) -> np.ndarray:
    """A pseudo-random permutation of `range(size)`, int64 [size].

    Each number goes through a Feistel network on the smallest even number of bits that covers `size`. A number that
    falls outside goes through it again until it falls inside (Black & Rogaway, "Ciphers with arbitrary finite domains",
    2002).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    # the value that each of the four rounds makes of each value of `half` bits, int64 [4, 2 ** half]
    values = [value.to_bytes(8, "little") for value in range(1 << half)]
    keys = [f"{key}/{number}".encode() for number in range(4)]
    digests = b"".join(hashlib.blake2b(value, digest_size=8, key=k).digest() for k in keys for value in values)
    rounds = (np.frombuffer(digests, dtype="<u8") & mask).astype(np.int64).reshape(4, -1)
    found = np.arange(size)
    outside = found.copy()
    while len(outside):
        left, right = found[outside] >> half, found[outside] & mask
        for mix in rounds:
            left, right = right, left ^ mix[right]
        found[outside] = left << half | right
        outside = outside[found[outside] >= size]
    return found


@dataclass(frozen=True)
class Validation:
    """The rows of every evaluation.

    Args:
        batches: in order, all with the same number of rows; the rows that fill up the last have no target that counts.
        tokens: targets that count.
        text_bytes: of UTF-8 that these targets stand for.
    """

    batches: list[Batch]
    tokens: int
    text_bytes: int


def validation(shards: Iterable[Shard], layout: Layout, tokens: int, batch_size: int) -> Validation:
    """The same rows at every evaluation: about `tokens` tokens that are no padding, spread evenly over the shards.

    Only the first shards that hold so many are used, so that the rows do not depend on what else is prepared.

    Raises:
        SettingError: there is not one row.
    """
    used: list[Shard] = []
    there = 0
    for shard in shards:
        used.append(shard)
        there += layout.real_tokens(shard.ends)
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
    numbers = np.arange(wanted) * window.rows // wanted
    batches = [window.take(numbers[i : i + batch_size]).filled(batch_size) for i in range(0, wanted, batch_size)]
    return Validation(batches, sum(b.count() for b in batches), window.target_bytes(numbers))


def unigram_loss(train: Sequence[np.ndarray], vocabulary: int, batches: Iterable[Batch]) -> float:
    """The loss of a model that knows only how often each token occurs: mean nats per target, each count raised by one.

    Args:
        train: token ids, in several arrays.
        vocabulary: the number of ids.
        batches: to predict.
    """
    counts = sum((np.bincount(tokens, minlength=vocabulary) for tokens in train), np.ones(vocabulary))
    nats = -np.log(counts / counts.sum())
    targets = np.concatenate([b.targets[b.targets != IGNORED].numpy() for b in batches])
    return float(nats[targets].mean())
