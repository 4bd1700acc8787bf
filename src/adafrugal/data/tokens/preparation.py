"""Prepare tokens in a separate process, ahead of training."""

from __future__ import annotations

import json
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from adafrugal.data.rows import Layout
from adafrugal.data.text import faults
from adafrugal.data.text.sources import Source
from adafrugal.data.text.tokenizer import Tokenizer
from adafrugal.data.tokens.encoding import Encoder, work_in_the_background
from adafrugal.data.tokens.store import StoredSplit
from adafrugal.system import files
from adafrugal.system.errors import SettingError
from adafrugal.system.processes import Helper, end_with_parent

VALIDATION_TOKENS = 1 << 18  # per validation shard; few, so that little text is read for a held-out share
PATIENCE = 0.1  # seconds between checks of another process
SAYS_EVERY = 15.0  # seconds between lines during a wait
KILLED = (
    "the preparation of {} ended without its work done ({}), as for lack of memory; data.processes=1 needs less, and "
    "the same command goes on from there"
)


@dataclass(frozen=True)
class Plan:
    """Which tokens to prepare, how many, and where."""

    directory: Path  # of the store
    source: Source
    tokenizer: Tokenizer
    layout: Layout
    fingerprint: str  # equal for equal documents and tokenizers
    shard_tokens: int  # approximate tokens per training shard
    window: int  # training shards whose rows are permuted together
    rows: int | None  # of the training split that the run reads; None for all
    validation_tokens: int | None  # in rows of the validation split; None for all
    limit: int | None  # bytes of the stored training split; None for no limit
    processes: int  # that encode text

    def splits(self) -> tuple[StoredSplit, StoredSplit]:
        """Open the stored training split and validation split."""
        train = StoredSplit(self.directory / "train", self.limit, self.window)
        return train, StoredSplit(self.directory / "validation")

    def has_enough(self, train: StoredSplit) -> bool:
        """Return whether the windows that the run reads are prepared, or no shard will follow."""
        train.refresh()
        if train.is_complete or self.rows is None:
            return train.is_complete
        return train.rows(self.layout, stop=len(train.entries) // self.window * self.window) >= self.rows

    def can_evaluate(self, validation: StoredSplit) -> bool:
        """Return whether the validation rows are prepared, or no shard will follow."""
        validation.refresh()
        if validation.is_complete or self.validation_tokens is None:
            return validation.is_complete
        return sum(self.layout.real_tokens(shard.ends) for shard in validation.shards()) >= self.validation_tokens


class Preparation:
    """The store of a plan as far as it is prepared, and a process that adds missing tokens.

    `say` is called with a line at the beginning and during long waits.
    """

    def __init__(self, plan: Plan, say: Callable[[str], None]) -> None:
        self._plan, self._say = plan, say
        self.train, self.validation = plan.splits()
        self._helper: Helper | None = None
        if not self._is_done():
            if not plan.directory.is_dir():
                about = {
                    "fingerprint": plan.fingerprint, "source": plan.source.described(),
                    "tokenizer": plan.tokenizer.fingerprint,
                }  # fmt: skip
                with faults.of_disk(plan.directory.parent), files.made(plan.directory) as scratch:
                    plan.tokenizer.save(scratch)
                    (scratch / "about.json").write_text(json.dumps(about, indent=2) + "\n")
            say(f"preparing tokens of {plan.source.name} → {plan.directory}")
            self._helper = Helper(__name__)
            self._helper.pipe.send(plan)

    def finish(self) -> None:
        """Wait until the plan's tokens are prepared, and end the process."""
        try:
            self.wait(self._is_done)
        finally:
            self.close()

    def wait(self, until: Callable[[], bool]) -> None:
        """Wait until `until` returns True.

        Raises:
            SettingError: the preparation failed.
        """
        said = time.monotonic()
        while not until():
            code = self._helper.process.poll()
            if code is not None and not until():  # checked again: tokens may have come before the end
                line = KILLED.format(self._plan.source.name, f"exit code {code}")
                with suppress(EOFError, OSError):  # a killed process has sent nothing
                    line = self._helper.pipe.recv()
                raise SettingError(line)
            if time.monotonic() - said > SAYS_EVERY:
                said = time.monotonic()
                tokens = sum(entry.tokens for entry in self.train.entries)
                self._say(f"waiting for tokens: {tokens:,} in {len(self.train.entries)} shards so far")
            time.sleep(PATIENCE)

    def close(self) -> None:
        """End the process; keep the tokens that it has prepared."""
        if self._helper is not None:
            self._helper.pipe.close()
            self._helper.end(10)

    def _is_done(self) -> bool:
        return self._plan.can_evaluate(self.validation) and self._plan.has_enough(self.train)


# -- the process ------------------------------------------------------------------------------------------------------


def main(pipe: Connection) -> None:
    """Prepare the validation split, then the training split; end when the other end of the pipe closes."""
    work_in_the_background()
    plan: Plan = pipe.recv()
    stopped = threading.Event()
    end_with_parent(5, pipe, stopped)  # seconds to finish

    def look() -> None:
        if stopped.is_set():
            sys.exit()

    try:
        with Encoder(plan.tokenizer, plan.processes, look) as encoder:
            fill(plan, encoder, look)
    except Exception as error:
        line = str(error)
        if isinstance(error, BrokenProcessPool):
            line = KILLED.format(plan.source.name, "a worker was killed")
        elif not isinstance(error, SettingError):  # a bug: print its traceback, too
            traceback.print_exc()
            line = f"the preparation of {plan.source.name} failed: {type(error).__name__}: {error}"
        with suppress(OSError):
            pipe.send(line)


def fill(plan: Plan, encoder: Encoder, look: Callable[[], None] = lambda: None) -> None:
    """Add the missing shards to each split; while another process writes it, wait and call `look`."""
    train, validation = plan.splits()
    for split, stored, is_enough, tokens, count_bytes in (
        (plan.source.validation, validation, plan.can_evaluate, VALIDATION_TOKENS, True),
        (plan.source.train, train, plan.has_enough, plan.shard_tokens, False),
    ):
        enough = partial(is_enough, stored)
        while not enough():
            with stored.alone() as alone:
                if alone and not enough():
                    shards = encoder.shards(plan.source, split, stored.position(), tokens, count_bytes)
                    stored.extend(shards, enough)
            look()
            if not enough():
                time.sleep(PATIENCE)
