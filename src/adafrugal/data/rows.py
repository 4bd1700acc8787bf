"""Cut the documents of a shard into rows of tokens: one document per row, or packed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Self

import numpy as np
import torch
from torch import Tensor

from adafrugal.data.tokens.encoding import Shard

IGNORED = -100  # a target that the loss leaves out; torch's default


class Tensors:
    """The tensors of a frozen dataclass; only its last fields may be None."""

    def tensors(self) -> list[Tensor]:
        """Return the tensors that are there, in order."""
        return [tensor for one in fields(self) if (tensor := getattr(self, one.name)) is not None]

    def each(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Change every tensor."""
        return type(self)(*map(change, self.tensors()))

    def to(self, device: torch.device) -> Self:
        """Copy to a device; to a GPU from pinned memory, without waiting."""
        if device.type != "cuda":
            return self
        return self.each(lambda tensor: tensor.pin_memory().to(device, non_blocking=True))


@dataclass(frozen=True)
class Batch(Tensors):
    """Rows of tokens, and the next token of each."""

    tokens: Tensor  # int64 [rows, length]
    targets: Tensor  # int64 [rows, length], the next token; `IGNORED` where there is none to predict
    real: Tensor  # int64 [rows], number of non-padding tokens
    positions: Tensor | None = None  # int64 [rows, length], in the document, if attention must stay within documents

    @classmethod
    def of(cls, *columns: np.ndarray) -> Batch:
        """Make tensors that share the arrays' memory."""
        return cls(*map(torch.from_numpy, columns))

    @classmethod
    def joined(cls, batches: Sequence[Batch]) -> Batch:
        """Concatenate batches with numpy, which starts no threads."""
        if len(batches) == 1:
            return batches[0]
        columns = zip(*(map(Tensor.numpy, batch.tensors()) for batch in batches), strict=True)
        return cls.of(*map(np.concatenate, columns))

    def count(self) -> int:
        """Return the number of targets that are not `IGNORED`."""
        return self._sums[0]

    def real_tokens(self) -> int:
        """Return the number of non-padding tokens."""
        return self._sums[1]

    @cached_property
    def _sums(self) -> tuple[int, int]:
        return int(np.count_nonzero(self.targets.numpy() != IGNORED)), int(self.real.numpy().sum())

    def split(self, rows: int) -> Iterator[Batch]:
        """Yield the batch in micro-batches of at most `rows` rows, views of this one."""
        for begin in range(0, len(self.tokens), rows):
            yield self.each(lambda tensor, begin=begin: tensor[begin : begin + rows])

    def filled(self, rows: int) -> Batch:
        """Fill the batch up to `rows` rows with copies of the first, with targets `IGNORED` and `real` 0."""
        there = len(self.tokens)
        if there == rows:
            return self
        numbers = torch.arange(rows)
        batch = self.each(lambda tensor: tensor[torch.where(numbers < there, numbers, 0)])
        batch.targets[there:], batch.real[there:] = IGNORED, 0
        return batch

    def share(self, rank: int, size: int) -> Batch:
        """Return the consecutive rows of one of `size` processes; the batch is filled so that all get equally many."""
        if size == 1:
            return self
        each = -(-len(self.tokens) // size)
        return list(self.filled(each * size).split(each))[rank]

    def ready(self, pin: bool) -> Batch:
        """Compute the sums that a step needs, and copy to pinned memory if `pin`."""
        batch = self.each(Tensor.pin_memory) if pin else self
        batch.count()  # caches `real_tokens`, too
        return batch


@dataclass(frozen=True)
class Layout:
    """Rules that cut documents into rows."""

    length: int  # tokens in a row
    packed: bool  # concatenate documents, with their end ids, and cut; else a row is one document, truncated or padded
    masked: bool  # in packed rows, the first token of a document is not a target, since it has no context in it
    end: int  # the id that closes a document, also a truncated one
    pad: int  # the padding id

    def count(self, documents: int, tokens: int) -> int:
        """Count the rows of a shard. Packed rows need one more token, the last target; the rest is unused."""
        return max(0, tokens - 1) // self.length if self.packed else documents

    def real_tokens(self, ends: np.ndarray) -> int:
        """Count the non-padding tokens in all rows of a shard with these `ends`, int64 [documents]."""
        if self.packed:
            return self.count(len(ends), int(ends[-1]) if len(ends) else 0) * self.length
        return int(np.minimum(np.diff(ends, prepend=0), self.length).sum())

    def rows(self, shard: Shard, numbers: np.ndarray) -> Batch:
        """Return the rows of a shard with these numbers, int64 [rows], in any order."""
        return self._packed(shard, numbers) if self.packed else self._documents(shard, numbers)

    def target_bytes(self, shard: Shard, numbers: np.ndarray) -> np.ndarray:
        """Count the UTF-8 bytes of text that the targets of these rows, int64 [rows], represent: int64 [rows].

        An end id represents 0 bytes, also where it replaces the last token of a truncated document. All counts are 0 if
        the shard has no `token_bytes`.
        """
        if shard.token_bytes is None:
            return np.zeros(len(numbers), dtype=np.int64)
        counted = shard.token_bytes.astype(np.int64)
        if self.packed:
            first = numbers * self.length + 1
            stop = first + self.length
            if self.masked:
                counted[shard.ends[:-1]] = 0  # first tokens of documents are not targets
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
        # documents that start at offsets 1 to `length` of a row; `length` is the last target's: int64 [starts]
        begin = numbers * self.length
        first = np.searchsorted(shard.ends, begin + 1)
        counts = np.searchsorted(shard.ends, begin + self.length, side="right") - first
        row = np.repeat(np.arange(len(numbers)), counts)  # indices into `numbers`
        nth = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)  # among the row's starts
        start = shard.ends[first[row] + nth] - begin[row]  # offset in the row
        targets[row, start - 1] = IGNORED
        latest = np.zeros((len(numbers), self.length + 1), dtype=np.int64)  # offset at which a token's document starts
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
        """Return where each document begins in the shard, and its number of tokens in the row, both int64 [rows]."""
        begin = np.where(numbers > 0, shard.ends[numbers - 1], 0)
        return begin, np.minimum(shard.ends[numbers] - begin, self.length)


class Window:
    """Consecutive shards; row numbers continue from one to the next."""

    def __init__(self, shards: Iterable[Shard], layout: Layout) -> None:
        self.shards, self._layout = list(shards), layout
        counts = [layout.count(len(shard.ends), len(shard.tokens)) for shard in self.shards]
        self._bounds = np.cumsum([0, *counts])  # int64 [shards + 1], the first row of each shard and the end
        self.rows = int(self._bounds[-1])

    def take(self, numbers: np.ndarray) -> Batch:
        """Return the rows with these numbers, int64 [rows], in any order and at least one."""
        found = [(where, self._layout.rows(shard, rows)) for shard, rows, where in self._by_shard(numbers)]
        batch = Batch.joined([some for _, some in found])
        if len(found) == 1:
            return batch
        back = np.argsort(np.concatenate([where for where, _ in found]))
        return batch.each(lambda tensor: torch.from_numpy(tensor.numpy()[back]))

    def target_bytes(self, numbers: np.ndarray) -> int:
        """Count the UTF-8 bytes of text that the targets of these rows, int64 [rows], represent."""
        found = self._by_shard(numbers)
        return sum(int(self._layout.target_bytes(shard, rows).sum()) for shard, rows, _ in found)

    def _by_shard(self, numbers: np.ndarray) -> Iterator[tuple[Shard, np.ndarray, np.ndarray]]:
        """Yield each shard that has some of the rows, their numbers in it, and their indices in `numbers`."""
        shards = np.searchsorted(self._bounds, numbers, side="right") - 1
        for shard in np.unique(shards):
            (where,) = np.nonzero(shards == shard)
            yield self.shards[shard], numbers[where] - self._bounds[shard], where
