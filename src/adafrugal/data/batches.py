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
from adafrugal.data.tokens.preparation import Plan, Preparation
from adafrugal.system.errors import SettingError

AHEAD = 2  # steps whose batches are made before they are wanted


class TrainingBatches:
    """The batch of each step, in an order that is shuffled within windows, anew in every epoch.

    A window is `plan.window` shards. Windows are numbered in the order of the text, and on in the next epoch. A batch
    waits until the windows that it reads are prepared.

    Args:
        plan: of the store.
        preparation: of the plan.
        seed: of the order.
        batch_size: rows per step, over all devices and micro-batches.
        steps: how many the run wants.
        repeat: whether a run longer than the text may read it again.

    Raises:
        SettingError: in any method: the text is too short for the run and must not repeat, as soon as that is known.
    """

    def __init__(
        self, plan: Plan, preparation: Preparation, seed: int, batch_size: int, steps: int, repeat: bool
    ) -> None:
        self._plan, self._preparation, self._train = plan, preparation, preparation.train
        self._seed, self._batch_size, self._steps, self._repeat = seed, batch_size, steps, repeat
        self._begins = [0]  # the first row of each window, as far as they are known
        self._open: tuple[int, Window, np.ndarray] | None = None  # its number, it, its rows as they are read
        self._total: int | None = None
        self._refuse_a_short_text()

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step; the first is step 1."""
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
        """Open a window, memory-mapped; wait until it is prepared."""
        return Window(map(self._train.open, self._shards(number)), self._plan.layout)

    def total(self) -> int | None:
        """The rows of an epoch; None while the text is not prepared to its end."""
        if self._total is None:
            self._train.refresh()
            self._total = self._train.rows(self._plan.layout) if self._train.is_complete else None
        return self._total

    def epochs(self, steps: int) -> float | None:
        """How often the text has been read after so many steps; None while its length is not known."""
        total = self.total()
        return steps * self._batch_size / total if total else None

    def _shards(self, number: int) -> range:
        """The shards of a window, once they are prepared."""
        size, train = self._plan.window, self._train

        def is_ready() -> bool:
            train.refresh()
            return train.is_complete or len(train.entries) >= (number + 1) * size

        self._preparation.wait(is_ready)
        if train.is_complete and number * size >= len(train.entries):
            self._refuse_a_short_text()
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
                " tokens; shorten the sequence, or see what data.source reads"
            )
        why = "data.store_limit_gib is reached" if self._train.full else "the text has no more"
        raise SettingError(
            f"trainer.steps is {self._steps}: that takes {wanted:,} rows and there are {total:,}, since {why}; "
            f"allowed: up to {total // self._batch_size:,} steps, or data.repeat=true"
        )


class Prefetched:
    """Training batches made in a thread, before they are wanted.

    Args:
        batches: that are made.
        last: the last step of the run.
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
