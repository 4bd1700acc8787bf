"""Documents into shards of tokens: by several processes, in the order of the documents, whatever their number."""

from __future__ import annotations

import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from adafrugal.data.text import documents, sources, tokenizer
from adafrugal.data.text.sources import Bundle, Part, Position, Source
from adafrugal.data.text.tokenizer import Tokenizer
from adafrugal.system import signals
from adafrugal.system.errors import SettingError

VALIDATION_TOKENS = 1 << 18  # in a shard of a validation part; few, so that little text is read for a held-out share
AHEAD = 3  # bundles under way for each process
ADVICE = {"not UTF-8": "convert the files to UTF-8", "not JSON": "one object a line", "no object": "one object a line"}
BROKEN_SHARE, BROKEN_ALWAYS = 0.01, 10  # broken documents up to which a part is still taken for sound


@dataclass(frozen=True)
class Shard:
    """The tokens of consecutive documents.

    Args:
        tokens: unsigned integers [tokens], each document closed by the tokenizer's end id.
        ends: int64 [documents], where each document ends in `tokens`.
        token_bytes: uint32 [tokens], the bytes of text that each stands for; None where nobody asked.
        text_bytes: of all documents, as UTF-8.
        skipped: reason -> documents that were left out.
        after: where the next shard begins.
    """

    tokens: np.ndarray
    ends: np.ndarray
    token_bytes: np.ndarray | None
    text_bytes: int
    skipped: dict[str, int]
    after: Position


@dataclass
class Cut:
    """A bundle's documents as tokens."""

    tokens: np.ndarray
    lengths: np.ndarray
    token_bytes: np.ndarray | None
    text_bytes: int
    sound: int
    skipped: Counter[str]
    fields: list[str] = field(default_factory=list)


def cut(pieces: list[Any], rules: documents.Rules, cutter: Tokenizer, count_bytes: bool) -> Cut:
    """The documents of some pieces of a file as tokens.

    Raises:
        SettingError: the tokenizer gave an id beyond its own vocabulary.
    """
    found = documents.select(pieces, rules)
    counted = None
    if count_bytes:
        both = cutter.encode_with_bytes(found.texts)
        ids = [tokens for tokens, _ in both]
        counted = _joined([counts for _, counts in both], np.uint32)
    else:
        ids = cutter.encode(found.texts)
    tokens = _joined(ids, cutter.dtype)
    if len(tokens) and int(tokens.max()) >= cutter.size:
        raise SettingError(f"the tokenizer gave the id {tokens.max()}, beyond its vocabulary of {cutter.size:,}")
    lengths = np.array([len(one) for one in ids], dtype=np.int64)
    text_bytes = sum(len(text.encode()) for text in found.texts)
    return Cut(tokens, lengths, counted, text_bytes, found.sound, found.skipped, found.fields)


def _joined(arrays: list[np.ndarray], dtype: type[np.unsignedinteger]) -> np.ndarray:
    return np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.empty(0, dtype)


def make(
    source: Source, part: Part, cutting: Cutting, begin: Position, tokens: int, count_bytes: bool = False
) -> Iterator[Shard]:
    """The shards of a part from a position on.

    Args:
        source: what is read,
        part: and which part of it.
        cutting: the processes that cut.
        begin: where the first shard begins.
        tokens: after which a shard is closed, with the bundle in hand.
        count_bytes: fill `Shard.token_bytes`.

    Raises:
        SettingError: a file cannot be read, or too many documents are broken.
    """
    sound = _Soundness(source.name, source.text_field)
    held: list[Cut] = []
    so_far, after = 0, begin
    for made, after in cutting.in_order(sources.read(source, part, begin), part.rules, count_bytes):
        sound.check(made)
        held.append(made)
        so_far += len(made.tokens)
        if so_far >= tokens:
            yield _closed(held, after)
            held, so_far = [], 0
    if any(len(c.tokens) or c.skipped for c in held):
        yield _closed(held, after)


class _Soundness:
    """Counts broken documents and refuses a part in which they are no exception."""

    def __init__(self, name: str, text_field: str) -> None:
        self._name, self._text_field = name, text_field
        self._documents, self._broken = 0, Counter[str]()

    def check(self, made: Cut) -> None:
        if made.fields and not self._documents and not made.sound:
            fields = ", ".join(made.fields)
            raise SettingError(
                f"data.text_field is {self._text_field}, which {self._name} does not have; allowed: {fields}"
            )
        self._documents += made.sound
        self._broken.update({reason: n for reason, n in made.skipped.items() if reason != "empty"})
        broken = self._broken.total()
        seen = self._documents + broken
        if broken > max(BROKEN_ALWAYS, BROKEN_SHARE * seen):
            reason, count = self._broken.most_common(1)[0]
            advice = ADVICE.get(reason, "mend the files")
            raise SettingError(
                f"data.source is {self._name}, where {broken:,} of the first {seen:,} documents are broken "
                f"({count:,}: {reason}); allowed: {BROKEN_SHARE:.0%}, which are skipped and counted; {advice}"
            )


def _closed(held: list[Cut], after: Position) -> Shard:
    counted = [c.token_bytes for c in held if c.token_bytes is not None]
    return Shard(
        tokens=np.concatenate([c.tokens for c in held]),
        ends=np.cumsum(np.concatenate([c.lengths for c in held])),
        token_bytes=np.concatenate(counted) if counted else None,
        text_bytes=sum(c.text_bytes for c in held),
        skipped=dict(sum((c.skipped for c in held), Counter[str]())),
        after=after,
    )


# -- in several processes ---------------------------------------------------------------------------------------------


class Cutting:
    """Cuts bundles in several processes; with one, in this. Use as a context.

    Args:
        tokenizer_at: the tokenizer's directory.
        processes: how many.
        look: called after each bundle; what it raises ends the work.
    """

    def __init__(self, tokenizer_at: Path, processes: int, look: Callable[[], None] = lambda: None) -> None:
        self._tokenizer_at, self._look = tokenizer_at, look
        self._ahead = AHEAD * processes
        self._pool: Executor = _Here() if processes == 1 else _pool(tokenizer_at, processes)
        if processes == 1:
            _begin(tokenizer_at)

    def __enter__(self) -> Cutting:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)

    def in_order(
        self, bundles: Iterable[Bundle], rules: documents.Rules, count_bytes: bool
    ) -> Iterator[tuple[Cut, Position]]:
        """The bundles cut, in their order; never more of them in memory than keep the processes busy.

        Where reading fails, what was read before comes first.
        """
        waiting: deque[tuple[Future[Cut], Position]] = deque()
        failure: SettingError | None = None
        try:
            for bundle in bundles:
                waiting.append((self._pool.submit(_cut, bundle.pieces, rules, count_bytes), bundle.after))
                if len(waiting) > self._ahead:
                    future, after = waiting.popleft()
                    yield future.result(), after
                self._look()
        except SettingError as error:
            failure = error
        for future, after in waiting:
            yield future.result(), after
            self._look()
        if failure is not None:
            raise failure


class _Here(Executor):
    """Does at once, in this process, what is submitted."""

    def submit(self, work: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(work(*arguments, **named))
        return future


def _pool(tokenizer_at: Path, processes: int) -> ProcessPoolExecutor:
    pool = ProcessPoolExecutor(processes, get_context("spawn"), _begin_worker, (tokenizer_at,))
    for _ in range(processes):  # begun now, while this process imports what it reads with
        pool.submit(_cut, [], documents.Rules(json_lines=False, text_field=""), False)
    return pool


def _begin_worker(tokenizer_at: Path) -> None:
    work_for_the_parent()
    parent = parent_process()

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent").start()
    _begin(tokenizer_at)


def _begin(tokenizer_at: Path) -> None:
    global _tokenizer
    _tokenizer = tokenizer.load(tokenizer_at)


def _cut(pieces: list[Any], rules: documents.Rules, count_bytes: bool) -> Cut:
    return cut(pieces, rules, _tokenizer, count_bytes)


_tokenizer: Tokenizer  # of this process


def work_for_the_parent() -> None:
    """In a process that works for another: be ended by it alone, and let it have the processor first."""
    signals.leave_to_the_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    os.nice(5)
