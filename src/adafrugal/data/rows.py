"""Rows of tokens, cut from the documents of a shard: one document each, or packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adafrugal.data.shards import Shard

IGNORED = -100  # a target that is not counted; torch's own default


@dataclass(frozen=True)
class Row:
    """One row.

    Args:
        tokens: int64 [length].
        targets: int64 [length], the token after each; `IGNORED` where there is none to predict.
        positions: int64 [length], counted anew from each document's beginning.
        real: how many of the tokens are no padding.
        target_bytes: of the text that the targets stand for; 0 where the shard does not say.
    """

    tokens: np.ndarray
    targets: np.ndarray
    positions: np.ndarray
    real: int
    target_bytes: int


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

    def row(self, shard: Shard, number: int) -> Row:
        """One row of a shard."""
        return self._packed(shard, number) if self.packed else self._document(shard, number)

    def _packed(self, shard: Shard, number: int) -> Row:
        begin, stop = number * self.length, (number + 1) * self.length
        span = shard.tokens[begin : stop + 1].astype(np.int64)
        tokens, targets = span[:-1], span[1:].copy()
        positions = np.arange(self.length, dtype=np.int64)
        counted = shard.token_bytes[begin + 1 : stop + 1].astype(np.int64) if shard.token_bytes is not None else None
        if self.masked:
            first, last = np.searchsorted(shard.ends, [begin + 1, stop], side="left")
            starts = shard.ends[first : last + 1] - begin  # of documents, as places in this row
            starts = starts[starts <= self.length]
            targets[starts - 1] = IGNORED
            if counted is not None:
                counted[starts - 1] = 0
            for start in starts[starts < self.length]:
                positions[start:] = np.arange(self.length - start)
        return Row(tokens, targets, positions, self.length, int(counted.sum()) if counted is not None else 0)

    def _document(self, shard: Shard, number: int) -> Row:
        begin = int(shard.ends[number - 1]) if number else 0
        stop = int(shard.ends[number])
        real = min(stop - begin, self.length)
        tokens = np.full(self.length, self.pad, dtype=np.int64)
        tokens[:real] = shard.tokens[begin : begin + real]
        tokens[real - 1] = self.end
        targets = np.full(self.length, IGNORED, dtype=np.int64)
        targets[: real - 1] = tokens[1:real]
        counted = shard.token_bytes[begin + 1 : begin + real - 1] if shard.token_bytes is not None else ()
        return Row(tokens, targets, np.arange(self.length, dtype=np.int64), real, int(np.sum(counted)))


class Window:
    """Consecutive shards, whose rows are permuted among each other.

    Args:
        shards: in order.
        layout: of the rows.
    """

    def __init__(self, shards: Sequence[Shard], layout: Layout) -> None:
        self.shards, self._layout = list(shards), layout
        counts = [layout.count(len(shard.ends), len(shard.tokens)) for shard in shards]
        self._stops = np.cumsum(counts)
        self.rows = int(self._stops[-1]) if counts else 0

    def row(self, place: int) -> Row:
        """A row by its place in the window."""
        shard = int(np.searchsorted(self._stops, place, side="right"))
        before = int(self._stops[shard - 1]) if shard else 0
        return self._layout.row(self.shards[shard], place - before)
