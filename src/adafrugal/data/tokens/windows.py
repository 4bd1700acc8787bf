"""The windows of a corpus in the order in which a run reads them: from a store, or from a stream.

A turn is one window read once; the turns of an epoch read all windows in their order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from adafrugal.data.rows import Window
from adafrugal.data.text.sources import Position
from adafrugal.data.tokens.encoding import Shard
from adafrugal.data.tokens.preparation import Plan, Preparation
from adafrugal.data.tokens.store import Entry
from adafrugal.system.errors import SettingError


class Windows(Protocol):
    """What training batches ask of a corpus."""

    def rows(self, turn: int) -> int | None:
        """The rows of a turn, once they are known; None where the text has ended and must not repeat."""

    def open(self, turn: int) -> Window:
        """The window of a turn whose rows are known."""

    def total(self) -> int | None:
        """The rows of an epoch, as soon as they are known."""

    def state(self, turn: int) -> dict[str, Any]:
        """Plain values from which another process continues with that turn."""

    def why_short(self) -> str:
        """Why there is no more text, for a message."""

    def entries(self) -> list[Entry]:
        """How much there is in each shard so far."""

    def close(self) -> None:
        """End what works in the background."""


class StoredWindows:
    """Windows of a store, prepared in the background as far as the run reads.

    Args:
        plan: what the run reads.
        repeat: whether the text may be read again.
        say: told, in a line, while a window is waited for.
    """

    def __init__(self, plan: Plan, repeat: bool, say: Callable[[str], None]) -> None:
        self._plan, self._repeat = plan, repeat
        self._part, validation = plan.parts()
        self._preparation: Preparation | None = None
        self._total: int | None = None
        self._begins: tuple[int, dict[str, Any]] | None = None  # a turn and where it begins
        self._closed = False
        if not (plan.can_evaluate(validation) and plan.has_enough(self._part)):
            self._preparation = Preparation(plan, Position(), say)
        try:
            self._wait(lambda: plan.can_evaluate(validation))
        except BaseException:
            self.close()
            raise
        self.validation = validation

    def rows(self, turn: int) -> int | None:
        """The rows of a turn; waits until its window is prepared."""
        self._wait(lambda: self._is_ready(turn))
        span = self._span(turn)
        if span is None:
            return None
        return sum(self._plan.layout.count(e.documents, e.tokens) for e in self._part.entries[span.start : span.stop])

    def open(self, turn: int) -> Window:
        """The window of a turn, memory-mapped."""
        return Window([self._part.open(number) for number in self._span(turn) or ()], self._plan.layout)

    def total(self) -> int | None:
        """The rows of an epoch, once the store is complete."""
        if not self._part.is_complete:
            self._part.refresh()
        if self._total is None and self._part.is_complete:
            self._total = sum(self._plan.layout.count(e.documents, e.tokens) for e in self._part.entries)
        return self._total

    def why_short(self) -> str:
        """Why there is no more text, for a message."""
        return "data.store_limit_gib is reached" if self._part.full else "the text has no more"

    def state(self, turn: int) -> dict[str, Any]:
        """Where a turn's text begins: a store is entered at any place, but a stream may go on from it."""
        if self._begins is None or self._begins[0] != turn:
            span = self._span(turn)
            entries = self._part.entries[: span.start if span else 0]
            begin = entries[-1].after if entries else [0, 0]
            rows = sum(self._plan.layout.count(entry.documents, entry.tokens) for entry in entries)
            self._begins = (turn, {"begin": begin, "rows_of_epoch": rows})
        return self._begins[1] | {"total": self.total()}

    def entries(self) -> list[Entry]:
        """The shards that there are."""
        return self._part.entries

    def close(self) -> None:
        """End the preparation."""
        self._closed = True
        if self._preparation is not None:
            self._preparation.close()

    def _span(self, turn: int) -> range | None:
        """The shards of a turn that is ready; None where there is none."""
        window, entries = self._plan.window, len(self._part.entries)
        if self._part.is_complete:
            count = -(-entries // window)
            if turn >= count and self._repeat and self._part.full:
                raise SettingError(
                    "data.store_limit_gib is reached, so that data.repeat would repeat a part of the text; allowed: "
                    "a higher limit or null, or data.repeat=false"
                )
            if turn >= count and not (self._repeat and count):
                return None
            turn %= max(1, count)
        return range(turn * window, min((turn + 1) * window, entries))

    def _is_ready(self, turn: int) -> bool:
        self._part.refresh()
        return self._part.is_complete or len(self._part.entries) >= (turn + 1) * self._plan.window

    def _wait(self, until: Callable[[], bool]) -> None:
        if self._preparation is None:
            if not until():
                raise RuntimeError("nothing prepares the tokens that are waited for")
            return
        self._preparation.wait(lambda: self._closed or until(), self._progress)
        if self._closed:
            raise RuntimeError("the corpus is closed")

    def _progress(self) -> str:
        tokens = sum(entry.tokens for entry in self._part.entries)
        return f"{tokens:,} in {len(self._part.entries)} shards so far"


class StreamedWindows:
    """Windows of a stream, one after the other, each in memory while it is read; validation rows are stored.

    Args:
        plan: what the run reads.
        repeat: whether the text may be read again.
        say: told, in a line, while a window is waited for.
        state: where to begin, as `state` gave it.
    """

    def __init__(
        self, plan: Plan, repeat: bool, say: Callable[[str], None], state: dict[str, Any] | None = None
    ) -> None:
        self._plan, self._repeat, self._say = plan, repeat, say
        state = state or {}
        self._turn = state.get("turn", 0) - 1  # the last one that was received
        self._begins = {self._turn + 1: Position(*state.get("begin", (0, 0)))}  # turn -> where its text begins
        self._of_epoch: int = state.get("rows_of_epoch", 0)  # rows received in this epoch
        self._counted = {self._turn + 1: self._of_epoch}  # turn -> the rows of its epoch before it
        self._total: int | None = state.get("total")
        self._windows: dict[int, Window] = {}
        self._received: list[Entry] = []  # by this process
        self._closed = self._ended = False
        self._preparation = Preparation(plan, self._begins[self._turn + 1], say)
        self.validation = plan.parts()[1]
        try:
            self._preparation.wait(lambda: plan.can_evaluate(self.validation), lambda: "validation rows first")
        except BaseException:
            self.close()
            raise

    def rows(self, turn: int) -> int | None:
        """The rows of a turn; waits until its window is received."""
        while self._turn < turn:
            if not self._receive():
                return None
        return self._windows[turn].rows

    def open(self, turn: int) -> Window:
        """The window of a turn: the last one received, or the one before it."""
        return self._windows[turn]

    def total(self) -> int | None:
        """The rows of an epoch, once one was read to its end."""
        return self._total

    def why_short(self) -> str:
        """Why there is no more text, for a message."""
        return "the text has no more"

    def state(self, turn: int) -> dict[str, Any]:
        """Where a turn's text begins."""
        begin = self._begins[turn]
        return {
            "begin": [begin.file, begin.piece],
            "rows_of_epoch": self._counted[turn],
            "total": self._total,
        }

    def entries(self) -> list[Entry]:
        """The shards that were received."""
        return self._received

    def close(self) -> None:
        """End the preparation."""
        self._closed = True
        self._preparation.close()

    def _receive(self) -> bool:
        """The next window; False where the text has ended and must not repeat."""
        shards = self._shards()
        if not shards and self._repeat and self._of_epoch:
            self._again()
            shards = self._shards()
        if not shards:
            return False
        self._turn += 1
        window = Window(shards, self._plan.layout)
        self._windows[self._turn] = window
        self._received += [
            Entry(len(s.ends), len(s.tokens), s.text_bytes, 0, s.skipped, {}, [s.after.file, s.after.piece])
            for s in shards
        ]
        self._of_epoch += window.rows
        self._begins[self._turn + 1] = shards[-1].after
        self._counted[self._turn + 1] = self._of_epoch
        for gone in [turn for turn in self._windows if turn < self._turn - 1]:
            del self._windows[gone], self._begins[gone], self._counted[gone]
        return True

    def _again(self) -> None:
        self._preparation.close()
        self._of_epoch, self._ended = 0, False
        self._begins[self._turn + 1], self._counted[self._turn + 1] = Position(), 0
        self._preparation = Preparation(self._plan, Position(), self._say)
        if self._closed:  # meanwhile
            self._preparation.close()

    def _shards(self) -> list[Shard]:
        """The shards of the next window: as many as it has, fewer at the end, none after it."""
        found: list[Shard] = []

        def receive() -> bool:
            while not (self._closed or self._ended) and len(found) < self._plan.window:
                shard = self._preparation.receive()
                if shard is False:
                    return False
                if shard is None:
                    self._ended = True
                    self._total = self._of_epoch + Window(found, self._plan.layout).rows
                else:
                    found.append(shard)
            return True

        self._preparation.wait(receive, lambda: f"shard {len(found) + 1} of this window")
        if self._closed:
            raise RuntimeError("the corpus is closed")
        return found
