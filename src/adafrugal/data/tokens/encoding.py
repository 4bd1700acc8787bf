"""Encode documents into shards of tokens, in document order, by several processes."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import numpy as np

from adafrugal.data.text import sources
from adafrugal.data.text.documents import Counts, Rules, select
from adafrugal.data.text.sources import Position, Source, Split
from adafrugal.data.text.tokenizer import Tokenizer
from adafrugal.system.errors import SettingError
from adafrugal.system.processes import end_with_parent
from adafrugal.system.signals import leave_to_the_parent

AHEAD = 3  # bundles per process, in work or waiting
ADVICE = {"not UTF-8": "convert the files to UTF-8", "not JSON": "one object a line", "no object": "one object a line"}
BROKEN_SHARE, BROKEN_ALWAYS = 0.01, 10  # broken documents that a split may have: the larger counts


@dataclass(frozen=True)
class Shard:
    """The tokens of consecutive documents."""

    tokens: np.ndarray  # uint16 or uint32 [tokens], each document closed by the tokenizer's end id
    ends: np.ndarray  # int64 [documents], where each document ends in `tokens`
    token_bytes: np.ndarray | None  # uint32 [tokens], UTF-8 bytes of text of each token; None if they are not counted
    text_bytes: int  # UTF-8 bytes of all documents
    skipped: dict[str, int]  # reason -> number of skipped documents
    after: Position  # where the next shard begins


class Encoder:
    """Encodes bundles of text in worker processes, or in a thread if `processes` is 1. A context manager.

    `look` is called after each bundle; an exception from it ends the work.
    """

    def __init__(self, tokenizer: Tokenizer, processes: int, look: Callable[[], None] = lambda: None) -> None:
        self._ahead, self._look = AHEAD * processes, look
        if processes == 1:
            self._pool: Executor = ThreadPoolExecutor(1, initializer=_begin, initargs=(tokenizer, False))
        else:
            self._pool = ProcessPoolExecutor(processes, get_context("spawn"), _begin, (tokenizer, True))
        for _ in range(processes):  # start workers now, while this process imports its readers
            self._pool.submit(os.getpid)

    def __enter__(self) -> Encoder:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def shards(
        self, source: Source, split: Split, begin: Position, tokens: int, count_bytes: bool = False
    ) -> Iterator[Shard]:
        """Yield the shards of a split from a position on; `count_bytes` fills their `token_bytes`.

        A shard is closed after the bundle that brings it to `tokens` tokens.

        Raises:
            SettingError: a file cannot be read, or too many documents are broken.
        """
        held: list[Shard] = []
        total = Counts()
        for shard, counts in self._in_order(sources.read(source, split, begin), split.rules, count_bytes):
            _refuse_broken(source, counts, total)
            held.append(shard)
            if sum(len(one.tokens) for one in held) >= tokens:
                yield _joined(held)
                held = []
        if any(len(one.tokens) or one.skipped for one in held):
            yield _joined(held)

    def _in_order(
        self, bundles: Iterator[tuple[list[Any], Position]], rules: Rules, count_bytes: bool
    ) -> Iterator[tuple[Shard, Counts]]:
        """Yield a shard and the counts of each bundle; raise a reading error after all text that precedes it."""
        waiting: deque[Future[tuple[Shard, Counts]]] = deque()
        failure: SettingError | None = None
        try:
            for pieces, after in bundles:
                waiting.append(self._pool.submit(encode, pieces, after, rules, count_bytes))
                if len(waiting) > self._ahead:
                    yield waiting.popleft().result()
                self._look()
        except SettingError as error:
            failure = error
        for future in waiting:
            yield future.result()
            self._look()
        if failure is not None:
            raise failure


_tokenizer: Tokenizer  # of this worker


def _begin(tokenizer: Tokenizer, is_process: bool) -> None:
    """Begin a worker."""
    global _tokenizer
    _tokenizer = tokenizer
    if is_process:
        leave_to_the_parent()
        end_with_parent()
        work_in_the_background()


def encode(pieces: list[Any], after: Position, rules: Rules, count_bytes: bool) -> tuple[Shard, Counts]:
    """Encode the documents in pieces of a file, in a worker.

    Raises:
        SettingError: the tokenizer gave an id beyond its vocabulary.
    """
    cutter = _tokenizer
    texts, counts = select(pieces, rules)
    ids, token_bytes = [], None
    if count_bytes:
        ids, sizes = zip(*cutter.encode_with_bytes(texts), strict=True) if texts else ((), ())
        token_bytes = np.concatenate([np.empty(0, np.int64), *sizes]).astype(np.uint32)
    else:
        ids = cutter.encode(texts)
    tokens = np.concatenate([np.empty(0, cutter.dtype), *ids])
    if len(tokens) and int(tokens.max()) >= cutter.size:
        raise SettingError(f"the tokenizer gave the id {tokens.max()}, beyond its vocabulary of {cutter.size:,}")
    ends = np.cumsum(np.array([len(one) for one in ids], dtype=np.int64))
    text_bytes = sum(len(text.encode()) for text in texts)
    return Shard(tokens, ends, token_bytes, text_bytes, dict(counts.skipped), after), counts


def _joined(shards: list[Shard]) -> Shard:
    starts = np.cumsum([0, *(len(shard.tokens) for shard in shards[:-1])])
    counted = [shard.token_bytes for shard in shards if shard.token_bytes is not None]
    return Shard(
        tokens=np.concatenate([shard.tokens for shard in shards]),
        ends=np.concatenate([shard.ends + start for shard, start in zip(shards, starts, strict=True)]),
        token_bytes=np.concatenate(counted) if counted else None,
        text_bytes=sum(shard.text_bytes for shard in shards),
        skipped=dict(sum((Counter(shard.skipped) for shard in shards), Counter[str]())),
        after=shards[-1].after,
    )


def _refuse_broken(source: Source, counts: Counts, total: Counts) -> None:
    """Add a bundle's counts to the total; raise SettingError if too many documents are broken."""
    if counts.fields and not counts.sound and not total.sound:
        sources.refuse_missing_field(source, counts.fields)
    total.sound += counts.sound
    total.skipped.update({reason: n for reason, n in counts.skipped.items() if reason != "empty"})
    broken = total.skipped.total()
    seen = total.sound + broken
    if broken > max(BROKEN_ALWAYS, BROKEN_SHARE * seen):
        ((reason, count),) = total.skipped.most_common(1)
        raise SettingError(
            f"data.source is {source.name}, where {broken:,} of the first {seen:,} documents are broken "
            f"({count:,}: {reason}); allowed: {BROKEN_SHARE:.0%}, which are skipped and counted; "
            f"{ADVICE.get(reason, 'mend the files')}"
        )


def work_in_the_background() -> None:
    """Give this process a lower priority than training, and its tokenizer one thread."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # documents are divided over processes instead
    os.nice(5)
