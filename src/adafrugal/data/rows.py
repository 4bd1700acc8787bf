"""Rows of tokens, cut from the documents of a shard: one document each, or packed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from adafrugal.data.tokens.encoding import Shard

IGNORED = -100  # a target that is not counted; torch's own default


@dataclass(frozen=True)
class Batch:
    """Rows of tokens and the token that follows each of them.

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
    def of(cls, *columns: np.ndarray) -> Batch:
        """Make the tensors of arrays, which share their memory."""
        return cls(*map(torch.from_numpy, columns))

    @classmethod
    def joined(cls, batches: Sequence[Batch]) -> Batch:
        """Concatenate batches; by numpy, which starts no threads."""
        if len(batches) == 1:
            return batches[0]
        columns = [[tensor.numpy() for tensor in batch._tensors()] for batch in batches]
        return cls.of(*map(np.concatenate, zip(*columns, strict=True)))

    def count(self) -> int:
        """The number of targets that count."""
        return self._sums[0]

    def real_tokens(self) -> int:
        """The number of tokens that are no padding."""
        return self._sums[1]

    def split(self, rows: int) -> Iterator[Batch]:
        """Yield the batch in micro-batches of at most `rows` rows."""
        for begin in range(0, len(self.tokens), rows):
            yield self._slice(begin, begin + rows)

    def filled(self, rows: int) -> Batch:
        """Add copies of the first row up to `rows` rows; their targets are `IGNORED` and they have no real token."""
        there = len(self.tokens)
        if there == rows:
            return self
        numbers = torch.arange(rows)
        batch = self._each(lambda tensor: tensor[torch.where(numbers < there, numbers, 0)])
        batch.targets[there:], batch.real[there:] = IGNORED, 0
        return batch

    def share(self, rank: int, size: int) -> Batch:
        """Return the neighbouring rows that one of `size` processes takes: the same number for each, after filling."""
        if size == 1:
            return self
        each = -(-len(self.tokens) // size)
        return self.filled(each * size)._slice(rank * each, (rank + 1) * each)

    def ready(self, pin: bool) -> Batch:
        """Compute the sums that a step needs, and copy to pinned memory if `pin`."""
        batch = self._each(lambda tensor: tensor.pin_memory()) if pin else self
        batch.count()  # and `real_tokens`; both are kept
        return batch

    def to(self, device: torch.device) -> Batch:
        """Copy the batch to a device; to a GPU from pinned memory, without waiting."""
        if device.type != "cuda":
            return self
        pinned = self._each(lambda tensor: tensor if tensor.is_pinned() else tensor.pin_memory())
        return pinned._each(lambda tensor: tensor.to(device, non_blocking=True))

    @cached_property
    def _sums(self) -> tuple[int, int]:
        return int(np.count_nonzero(self.targets.numpy() != IGNORED)), int(self.real.numpy().sum())

    def _slice(self, begin: int, stop: int) -> Batch:
        """Views of rows, which are pinned where the batch is."""
        return self._each(lambda tensor: tensor[begin:stop])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(*map(change, self._tensors()))

    def _tensors(self) -> list[Tensor]:
        tensors = self.tokens, self.targets, self.real, self.positions
        return [tensor for tensor in tensors if tensor is not None]


@dataclass(frozen=True)
class Layout:
    """How rows are made of documents.

    Args:
        length: tokens in a row.
        packed: rows follow each other without padding, each document after the other's end id; else a row is one
            document, truncated or padded.
        masked: in packed rows, the first token of a document is no target, since nothing before it is of its text.
        end: the id that closes a document; a truncated one has it, too.
        pad: the id that fills a row.
    """

    length: int
    packed: bool
    masked: bool
    end: int
    pad: int

    def count(self, documents: int, tokens: int) -> int:
        """The number of rows in a shard. Packed, less than a row is left over at its end, and not used."""
        return max(0, tokens - 1) // self.length if self.packed else documents

    def real_tokens(self, ends: np.ndarray) -> int:
        """The tokens that are no padding in all rows of a shard; `ends` int64 [documents] as in the shard."""
        if self.packed:
            return self.count(len(ends), int(ends[-1]) if len(ends) else 0) * self.length
        return int(np.minimum(np.diff(ends, prepend=0), self.length).sum())

    def rows(self, shard: Shard, numbers: np.ndarray) -> Batch:
        """Make rows of a shard; `numbers` is int64 [rows], in any order."""
        return self._packed(shard, numbers) if self.packed else self._documents(shard, numbers)

    def target_bytes(self, shard: Shard, numbers: np.ndarray) -> np.ndarray:
        """Count the bytes of text that the targets of each row stand for.

        A document's end stands for no text, nor does the end that replaces the last token of a truncated document.

        Args:
            shard: has `token_bytes`; without them every row has 0 bytes.
            numbers: int64 [rows], of the rows in the shard.

        Returns:
            int64 [rows].
        """
        if shard.token_bytes is None:
            return np.zeros(len(numbers), dtype=np.int64)
        counted = shard.token_bytes.astype(np.int64)
        if self.packed:
            first = numbers * self.length + 1
            stop = first + self.length
            if self.masked:
                counted[shard.ends[:-1]] = 0  # the first tokens of documents are no targets
        else:
            begin, real = self._spans(shard, numbers)
            first, stop = begin + 1, begin + np.maximum(real - 1, 1)
        before = np.concatenate([[0], np.cumsum(counted)])
        return before[stop] - before[first]

    def _packed(self, shard: Shard, numbers: np.ndarray) -> Batch:
        count = self.count(len(shard.ends), len(shard.tokens))
        tokens, targets = (
            shard.tokens[shift : shift + count * self.length].reshape(count, self.length)[numbers].astype(np.int64)
            for shift in (0, 1)
        )
        real = np.full(len(numbers), self.length, dtype=np.int64)
        if not self.masked:
            return Batch.of(tokens, targets, real)
        # the documents that start after a row's first token, the one after its last token included: int64 [starts]
        begin = numbers * self.length
        first = np.searchsorted(shard.ends, begin + 1)
        counts = np.searchsorted(shard.ends, begin + self.length, side="right") - first
        row = np.repeat(np.arange(len(numbers)), counts)  # indices into `numbers`
        nth = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)  # of the row's starts
        start = shard.ends[first[row] + nth] - begin[row]  # in the row, from 1 to `length`
        targets[row, start - 1] = IGNORED
        latest = np.zeros((len(numbers), self.length + 1), dtype=np.int64)  # where each token's document starts
        latest[row, start] = start
        latest = np.maximum.accumulate(latest[:, :-1], axis=1)
        return Batch.of(tokens, targets, real, np.arange(self.length) - latest)

    def _documents(self, shard: Shard, numbers: np.ndarray) -> Batch:
        begin, real = self._spans(shard, numbers)
        index, last = np.arange(self.length), real[:, None] - 1
        taken = shard.tokens.take(begin[:, None] + index, mode="clip").astype(np.int64)
        tokens = np.where(index <= last, taken, self.pad)
        np.put_along_axis(tokens, last, self.end, axis=1)
        targets = np.full_like(tokens, IGNORED)
        targets[:, :-1] = np.where(index[:-1] < last, tokens[:, 1:], IGNORED)
        return Batch.of(tokens, targets, real)

    def _spans(self, shard: Shard, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where each document begins in the shard and how many of its tokens a row takes, both int64 [rows]."""
        begin = np.where(numbers > 0, shard.ends[numbers - 1], 0)
        return begin, np.minimum(shard.ends[numbers] - begin, self.length)


class Window:
    """Consecutive shards, whose rows are numbered one after the other.

    Args:
        shards: in order.
        layout: of the rows.
    """

    def __init__(self, shards: Iterable[Shard], layout: Layout) -> None:
        self.shards, self._layout = list(shards), layout
        counts = [layout.count(len(shard.ends), len(shard.tokens)) for shard in self.shards]
        self._bounds = np.cumsum([0, *counts])  # int64 [shards + 1], the first row of each shard and the end
        self.rows = int(self._bounds[-1])

    def take(self, numbers: np.ndarray) -> Batch:
        """Make rows of the window, int64 [rows] in any order and at least one."""
        found = [(where, self._layout.rows(shard, rows)) for shard, rows, where in self._by_shard(numbers)]
        batch = Batch.joined([some for _, some in found])
        if len(found) == 1:
            return batch
        back = np.argsort(np.concatenate([where for where, _ in found]))
        return batch._each(lambda tensor: torch.from_numpy(tensor.numpy()[back]))

    def target_bytes(self, numbers: np.ndarray) -> int:
        """Count the bytes of text that the targets of rows, int64 [rows], stand for."""
        found = self._by_shard(numbers)
        return sum(int(self._layout.target_bytes(shard, rows).sum()) for shard, rows, _ in found)

    def _by_shard(self, numbers: np.ndarray) -> Iterator[tuple[Shard, np.ndarray, np.ndarray]]:
        """Each shard that has some of the rows, their numbers in it, and their indices in `numbers`."""
        shards = np.searchsorted(self._bounds, numbers, side="right") - 1
        for shard in np.unique(shards):
            (where,) = np.nonzero(shards == shard)
            yield self.shards[shard], numbers[where] - self._bounds[shard], where
