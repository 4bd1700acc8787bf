"""Rows of tokens, cut from the documents of a shard: one document each, or packed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from adafrugal.data.tokens.encoding import Shard

IGNORED = -100  # a target that is not counted; torch's own default


class Rows(NamedTuple):
    """Some rows.

    Args:
        tokens: int64 [rows, length].
        targets: int64 [rows, length], the token after each; `IGNORED` where there is none to predict.
        real: int64 [rows], how many tokens of each row are no padding.
        positions: int64 [rows, length], counted anew from each document's beginning; None where the layout does not
            mask documents.
    """

    tokens: np.ndarray
    targets: np.ndarray
    real: np.ndarray
    positions: np.ndarray | None = None


def joined(parts: Sequence[Rows]) -> Rows:
    """The rows of all parts, in order."""
    if len(parts) == 1:
        return parts[0]
    columns = zip(*parts, strict=True)
    return Rows(*(None if column[0] is None else np.concatenate(column) for column in columns))


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

    def real_tokens(self, shard: Shard) -> int:
        """The tokens in all rows of a shard that are no padding."""
        if self.packed:
            return self.count(len(shard.ends), len(shard.tokens)) * self.length
        return int(np.minimum(np.diff(shard.ends, prepend=0), self.length).sum())

    def rows(self, shard: Shard, numbers: np.ndarray) -> Rows:
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

    def _packed(self, shard: Shard, numbers: np.ndarray) -> Rows:
        count = self.count(len(shard.ends), len(shard.tokens))
        tokens, targets = (
            shard.tokens[shift : shift + count * self.length].reshape(count, self.length)[numbers].astype(np.int64)
            for shift in (0, 1)
        )
        real = np.full(len(numbers), self.length, dtype=np.int64)
        if not self.masked:
            return Rows(tokens, targets, real)
        row, start = self._starts(shard, numbers)
        targets[row, start - 1] = IGNORED
        latest = np.zeros((len(numbers), self.length + 1), dtype=np.int64)  # where the document of each place starts
        latest[row, start] = start
        latest = np.maximum.accumulate(latest[:, :-1], axis=1)
        return Rows(tokens, targets, real, np.arange(self.length) - latest)

    def _starts(self, shard: Shard, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find the documents that start after a row's first token, the one after its last token included.

        Returns:
            int64 [starts], indices into `numbers`; and int64 [starts], places in the row, from 1 to `length`.
        """
        begin = numbers * self.length
        first = np.searchsorted(shard.ends, begin + 1)
        counts = np.searchsorted(shard.ends, begin + self.length, side="right") - first
        row = np.repeat(np.arange(len(numbers)), counts)
        nth = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)  # of the row's starts
        return row, shard.ends[first[row] + nth] - begin[row]

    def _documents(self, shard: Shard, numbers: np.ndarray) -> Rows:
        begin, real = self._spans(shard, numbers)
        place, last = np.arange(self.length), real[:, None] - 1
        taken = shard.tokens.take(begin[:, None] + place, mode="clip").astype(np.int64)
        tokens = np.where(place <= last, taken, self.pad)
        np.put_along_axis(tokens, last, self.end, axis=1)
        targets = np.full_like(tokens, IGNORED)
        targets[:, :-1] = np.where(place[:-1] < last, tokens[:, 1:], IGNORED)
        return Rows(tokens, targets, real)

    def _spans(self, shard: Shard, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where each document begins in the shard and how many of its tokens a row takes, both int64 [rows]."""
        begin = np.where(numbers > 0, shard.ends[numbers - 1], 0)
        return begin, np.minimum(shard.ends[numbers] - begin, self.length)


class Window:
    """Consecutive shards, whose rows are permuted among each other.

    Args:
        shards: in order.
        layout: of the rows.
    """

    def __init__(self, shards: Sequence[Shard], layout: Layout) -> None:
        self.shards, self._layout = list(shards), layout
        counts = [layout.count(len(shard.ends), len(shard.tokens)) for shard in shards]
        self._bounds = np.cumsum([0, *counts])  # int64 [shards + 1], the first row of each shard and the end
        self.rows = int(self._bounds[-1])

    def take(self, places: np.ndarray) -> Rows:
        """Make the rows at some places, int64 [rows] in any order and at least one."""
        found = [(where, self._layout.rows(shard, numbers)) for shard, numbers, where in self._by_shard(places)]
        rows = joined([part for _, part in found])
        if len(found) == 1:
            return rows
        back = np.argsort(np.concatenate([where for where, _ in found]))
        return Rows(*(None if column is None else column[back] for column in rows))

    def target_bytes(self, places: np.ndarray) -> int:
        """Count the bytes of text that the targets of the rows at some places, int64 [rows], stand for."""
        found = self._by_shard(places)
        return sum(int(self._layout.target_bytes(shard, numbers).sum()) for shard, numbers, _ in found)

    def _by_shard(self, places: np.ndarray) -> Iterator[tuple[Shard, np.ndarray, np.ndarray]]:
        """Each shard that has some of the places, the numbers of its rows, and their indices in `places`."""
        shards = np.searchsorted(self._bounds, places, side="right") - 1
        for shard in np.unique(shards):
            (where,) = np.nonzero(shards == shard)
            yield self.shards[shard], places[where] - self._bounds[shard], where
