"""Choose the rows of each step's batch: a pure function of seed, step and index, so a resumed run needs no position."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np

from adafrugal.data.rows import IGNORED, Batch, Layout, Window
from adafrugal.data.tokens.encoding import Shard
from adafrugal.data.tokens.preparation import Plan, Preparation
from adafrugal.system.errors import SettingError

AHEAD = 2  # batches made in advance


class TrainingBatches:
    """Training batches by step. Rows are shuffled within windows, in a new order in every epoch.

    A window is `plan.window` shards. Windows are numbered in text order; the next epoch continues the numbers. Making a
    batch, which has `batch_size` rows over all devices and micro-batches, waits until its windows are prepared. A run
    of `steps` steps may read more than one epoch if `repeat`.

    Raises:
        SettingError: the text has too few rows; raised here, by `[step]` or by `window`, as soon as this is known.
    """

    def __init__(
        self, plan: Plan, preparation: Preparation, seed: int, batch_size: int, steps: int, repeat: bool
    ) -> None:
        self._plan, self._preparation, self._train = plan, preparation, preparation.train
        self._seed, self._batch_size, self._steps, self._repeat = seed, batch_size, steps, repeat
        self._begins = [0]  # first row of each window, as far as known
        self._open: tuple[int, Window, np.ndarray] | None = None  # window number, window, order of its rows
        self._total: int | None = None
        self._refuse_a_short_text()

    def __getitem__(self, step: int) -> Batch:
        """Return the batch of a step; the first step is 1."""
        self._refuse_a_short_text()
        row, stop = (step - 1) * self._batch_size, step * self._batch_size
        found: list[Batch] = []
        while row < stop:
            while row >= self._begins[-1]:
                shards = self._shards(len(self._begins) - 1)
                self._begins.append(self._begins[-1] + self._train.rows(self._plan.layout, shards.start, shards.stop))
            number = bisect_right(self._begins, row) - 1
            if self._open is None or self._open[0] != number:
                window = self.window(number)
                self._open = number, window, permutation(window.rows, key=f"{self._seed}/{number}")
            _, window, order = self._open
            first = self._begins[number]
            found.append(window.take(order[row - first : stop - first]))
            row += len(found[-1].tokens)
        return Batch.joined(found)

    def window(self, number: int) -> Window:
        """Wait until a window is prepared, and open it as memory maps."""
        return Window(map(self._train.open, self._shards(number)), self._plan.layout)

    def total(self) -> int | None:
        """Return the number of rows in an epoch; None while more shards may follow."""
        if self._total is None:
            self._train.refresh()
            self._total = self._train.rows(self._plan.layout) if self._train.is_complete else None
        return self._total

    def epochs(self, steps: int) -> float | None:
        """Return the epochs read after `steps` steps; None while the length of an epoch is unknown."""
        total = self.total()
        return steps * self._batch_size / total if total else None

    def _shards(self, number: int) -> range:
        """Wait until a window's shards are prepared, and return their numbers."""
        size, train = self._plan.window, self._train

        def is_ready() -> bool:
            train.refresh()
            return train.is_complete or len(train.entries) >= (number + 1) * size

        self._preparation.wait(is_ready)
        self._refuse_a_short_text()
        if train.is_complete and number * size >= len(train.entries):
            if train.full:
                raise SettingError(
                    "data.store_limit_gib is reached, so that data.repeat would repeat a part of the text; allowed: "
                    "a higher limit or null, or data.repeat=false"
                )
            number %= -(-len(train.entries) // size)
        return range(number * size, min((number + 1) * size, len(train.entries)))

    def _refuse_a_short_text(self) -> None:
        total, wanted = self.total(), self._steps * self._batch_size
        if total is None or (total and (self._repeat or wanted <= total)):
            return
        if not total:
            raise SettingError(
                f"the training part of the text has not one row of trainer.sequence_length ({self._plan.layout.length})"
                " tokens; shorten the sequence, lower data.held_out, or see what data.source reads"
            )
        why = "data.store_limit_gib is reached" if self._train.full else "the text has no more"
        raise SettingError(
            f"trainer.steps is {self._steps}: that takes {wanted:,} rows and there are {total:,}, since {why}; "
            f"allowed: up to {total // self._batch_size:,} steps, or data.repeat=true"
        )


class Prefetched:
    """Makes training batches in a thread, ahead of the steps that use them, up to the step `last`.

    `pin` copies batches to pinned memory, so that copies to a GPU are asynchronous.
    """

    def __init__(self, batches: TrainingBatches, last: int, pin: bool = False) -> None:
        self._batches, self._last, self._pin = batches, last, pin
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: dict[int, Future[Batch]] = {}

    def is_ready(self, step: int, timeout: float) -> bool:
        """Wait up to `timeout` seconds for a step's batch; return whether it is made or has failed."""
        return bool(wait([self._future(step)], timeout).done)

    def __call__(self, step: int) -> Batch:
        """Return the batch of a step; begin those of the next steps."""
        batch = self._future(step).result()
        self._ahead = {number: future for number, future in self._ahead.items() if number > step}
        return batch

    def close(self) -> None:
        """Cancel batches that are not begun, and end the thread."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _future(self, step: int) -> Future[Batch]:
        for number in (step, *range(step + 1, min(step + AHEAD, self._last) + 1)):
            if number not in self._ahead:
                self._ahead[number] = self._pool.submit(lambda n=number: self._batches[n].ready(self._pin))
        return self._ahead[step]


def permutation(size: int, key: str) -> np.ndarray:
    """Return a pseudo-random permutation of `range(size)`, int64 [size].

    Each number is encrypted by a Feistel network of four rounds on the smallest even number of bits that covers `size`.
    A result outside the range is encrypted again until it is inside (cycle walking; Black & Rogaway, "Ciphers with
    arbitrary finite domains", 2002).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    # tables of the four round functions, from `half` bits to `half` bits: int64 [4, 2 ** half]
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
    """The validation rows, the same in every evaluation."""

    batches: list[Batch]  # of equal size; all targets of the rows that fill up the last are `IGNORED`
    tokens: int  # number of targets that are not `IGNORED`
    text_bytes: int  # UTF-8 bytes of text that these targets represent


def validation(shards: Iterable[Shard], layout: Layout, tokens: int, batch_size: int) -> Validation:
    """Choose rows with about `tokens` non-padding tokens, spread evenly over the shards.

    Only the first shards that hold `tokens` tokens are used, so that the rows do not depend on how many are prepared.

    Raises:
        SettingError: the shards have no row.
    """
    used, there = [], 0
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


def unigram_loss(train: Sequence[Shard], vocabulary: int, batches: Iterable[Batch]) -> float:
    """Return the loss of a unigram model with add-one smoothing on the targets of `batches`, in mean nats per target.

    The model has `vocabulary` ids, counted in the shards `train`.
    """
    counts = sum((np.bincount(shard.tokens, minlength=vocabulary) for shard in train), np.ones(vocabulary))
    nats = -np.log(counts / counts.sum())
    targets = np.concatenate([b.targets[b.targets != IGNORED].numpy() for b in batches])
    return float(nats[targets].mean())
