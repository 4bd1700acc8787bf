"""Preparing tokens in a process of its own, ahead of the training that reads them."""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from subprocess import DEVNULL, Popen, TimeoutExpired
from typing import Literal

from adafrugal.data.rows import Layout
from adafrugal.data.text.sources import Position, Source
from adafrugal.data.tokens import encoding, store
from adafrugal.data.tokens.encoding import Cutting, Shard
from adafrugal.data.tokens.store import StoredPart
from adafrugal.system.errors import SettingError

PATIENCE = 0.1  # seconds between two looks at what another process does
KILLED = (
    "the preparation of {} ended without its work done ({}), as for lack of memory; data.processes=1 needs less, and "
    "the same command goes on from there"
)
SAYS_EVERY = 15.0  # seconds between two lines while somebody waits


@dataclass(frozen=True)
class Plan:
    """What is prepared, and how much of it.

    Args:
        directory: of the store.
        source, tokenizer_at, layout: what the tokens and the rows are made of.
        shard_tokens: in a training shard, about.
        window: training shards that are permuted together.
        rows: of the training part that the run reads; None for all.
        validation_tokens: in rows of the validation part; None for all.
        limit: bytes of the stored training part; None for no limit.
        processes: that cut text into tokens.
        streamed: the training part is handed over in memory and not stored.
    """

    directory: Path
    source: Source
    tokenizer_at: Path
    layout: Layout
    shard_tokens: int
    window: int
    rows: int | None
    validation_tokens: int | None
    limit: int | None
    processes: int
    streamed: bool

    def parts(self) -> tuple[StoredPart, StoredPart]:
        """The training and the validation part on disk."""
        return StoredPart(self.directory / "train", self.limit, self.window), StoredPart(self.directory / "validation")

    def has_enough(self, train: StoredPart) -> bool:
        """Whether the windows that the run reads are there, or no more will come."""
        train.refresh()
        if train.is_complete or self.streamed:
            return True
        return self.rows is not None and store.rows(train, self.layout, self.window) >= self.rows

    def can_evaluate(self, validation: StoredPart) -> bool:
        """Whether the validation rows are there, or no more will come."""
        validation.refresh()
        if validation.is_complete:
            return True
        if self.validation_tokens is None:
            return False
        found = (self.layout.real_tokens(validation.open(n)) for n in range(len(validation.entries)))
        return sum(found) >= self.validation_tokens


class Preparation:
    """A process that prepares; the one that trains looks at what is there, waits for it, and ends it.

    It is a plain Python process rather than one of multiprocessing's, which would import the main program again.

    Args:
        plan: what is prepared.
        begin: where the stream of a streamed training part begins.
        say: told now and then, in a line, while somebody waits.
    """

    def __init__(self, plan: Plan, begin: Position, say: Callable[[str], None]) -> None:
        self._plan, self._say = plan, say
        self._pipe, theirs = Pipe()
        code = "from adafrugal.data.tokens.preparation import main; main()"
        command = [sys.executable, "-P", "-c", code, str(theirs.fileno())]  # -P: modules of the user's are not ours
        with theirs:  # closed here, so that the pipe ends when the process does
            self._process = Popen(command, pass_fds=[theirs.fileno()], stdin=DEVNULL, start_new_session=True)
        self._pipe.send((plan, begin))

    def wait(self, until: Callable[[], bool], progress: Callable[[], str]) -> None:
        """Return when `until` holds.

        Raises:
            SettingError: the preparation failed.
        """
        said = time.monotonic()
        while not until():
            if self._process.poll() is not None and not until():  # asked again: it may have ended just now
                self.receive()  # it may have told why
                raise SettingError(KILLED.format(self._plan.source.name, f"exit code {self._process.returncode}"))
            if time.monotonic() - said > SAYS_EVERY:
                said = time.monotonic()
                self._say(f"waiting for tokens: {progress()}")
            time.sleep(PATIENCE)

    def receive(self) -> Shard | Literal[False] | None:
        """The next shard of a stream; None at its end; False while there is none."""
        try:
            found = self._pipe.recv() if self._pipe.poll() else False
        except (EOFError, OSError):  # it ended in the middle; `wait` finds out why
            return False
        if isinstance(found, str):
            raise SettingError(found)
        return found

    def close(self) -> None:
        """End the process; what it has prepared stays."""
        self._pipe.close()
        try:
            self._process.wait(10)
        except TimeoutExpired:
            self._process.kill()
            self._process.wait()


class _Stopped(Exception):
    """Somebody wants the preparation to end."""


def main() -> None:
    """The process: the validation part, then the training part; ends when the other end of its pipe does."""
    encoding.work_for_the_parent()
    pipe = Connection(int(sys.argv[1]))
    plan, begin = pipe.recv()
    stopped = threading.Event()

    def watch() -> None:
        wait([pipe])  # nothing else is sent
        stopped.set()
        time.sleep(5)  # to end in order
        os._exit(1)

    def look() -> None:
        if stopped.is_set():
            raise _Stopped

    threading.Thread(target=watch, daemon=True, name="parent").start()
    try:
        train, validation = plan.parts()
        with encoding.Cutting(plan.tokenizer_at, plan.processes, look) as cutting:
            _extend(plan, validation, plan.can_evaluate, cutting, look)
            if plan.streamed:
                _stream(plan, begin, pipe, cutting, look)
            else:
                _extend(plan, train, plan.has_enough, cutting, look)
    except _Stopped:
        pass
    except Exception as error:
        with suppress(OSError):
            pipe.send(_told(error, plan))


def _told(error: Exception, plan: Plan) -> str:
    """An error as a line; one that nobody foresaw also with its traceback, on stderr."""
    if isinstance(error, SettingError):
        return str(error)
    if isinstance(error, BrokenProcessPool):
        return KILLED.format(plan.source.name, "a worker was killed")
    traceback.print_exc()
    return f"the preparation of {plan.source.name} failed: {type(error).__name__}: {error}"


def _extend(
    plan: Plan, part: StoredPart, enough: Callable[[StoredPart], bool], cutting: Cutting, look: Callable[[], None]
) -> None:
    """Add to a part what is missing, as soon as no other process does."""
    name = part.directory.name
    while not enough(part):
        with part.alone() as alone:
            if alone and not enough(part):
                held_out = name == "validation"
                tokens = encoding.VALIDATION_TOKENS if held_out else plan.shard_tokens
                which = getattr(plan.source, name)
                found = encoding.make(plan.source, which, cutting, part.position(), tokens, count_bytes=held_out)
                part.extend(found, lambda: enough(part))
        look()
        time.sleep(PATIENCE)


def _stream(plan: Plan, begin: Position, stream: Connection, cutting: Cutting, look: Callable[[], None]) -> None:
    """Hand over the training shards in order, then None; a window of them is made before it is wanted."""
    made: queue.Queue[Shard | str | None] = queue.Queue(plan.window)

    def hand_over() -> None:
        with suppress(OSError):  # nobody reads any more
            while isinstance(shard := made.get(), Shard):
                stream.send(shard)
            stream.send(shard)

    sender = threading.Thread(target=hand_over, daemon=True, name="stream")
    sender.start()
    try:
        for shard in encoding.make(plan.source, plan.source.train, cutting, begin, plan.shard_tokens):
            _put(made, shard, look)
        _put(made, None, look)
    except _Stopped:
        raise
    except Exception as error:  # told in its turn, after the shards before it
        _put(made, _told(error, plan), look)
    while sender.is_alive():
        look()
        sender.join(PATIENCE)


def _put(made: queue.Queue[Shard | str | None], shard: Shard | str | None, look: Callable[[], None]) -> None:
    while True:
        look()
        with suppress(queue.Full):
            made.put(shard, timeout=PATIENCE)
            return
