"""The windows of a store in the order in which a run reads them."""

from __future__ import annotations

from collections.abc import Callable

from adafrugal.data.rows import Window
from adafrugal.data.tokens.preparation import Plan, Preparation
from adafrugal.system.errors import SettingError


class Windows:
    """The training windows of a store, prepared in the background as far as the run reads.

    Windows are numbered in the order of the text; the numbers go on in the next epoch.

    Args:
        plan: of the store.
        repeat: whether the text may be read again.
        say: called with a line during a wait for a window.

    Attributes:
        train, validation: the splits of the store; the validation rows are there.
    """

    def __init__(self, plan: Plan, repeat: bool, say: Callable[[str], None]) -> None:
        self._plan, self._repeat = plan, repeat
        self._total: int | None = None
        self._preparation = Preparation(plan, say)
        self.train, self.validation = self._preparation.train, self._preparation.validation
        try:
            self._preparation.wait(lambda: plan.can_evaluate(self.validation))
        except BaseException:
            self.close()
            raise

    def rows(self, number: int) -> int | None:
        """The rows of a window; waits until it is prepared. None where the text has ended and must not repeat."""
        self._preparation.wait(lambda: self._is_ready(number))
        shards = self._shards(number)
        return self.train.rows(self._plan.layout, shards.start, shards.stop) if shards else None

    def open(self, number: int) -> Window:
        """Open a window whose rows are known, memory-mapped."""
        return Window(map(self.train.open, self._shards(number)), self._plan.layout)

    def total(self) -> int | None:
        """The rows of an epoch, once the store is complete."""
        if self._total is None:
            self.train.refresh()
            self._total = self.train.rows(self._plan.layout) if self.train.is_complete else None
        return self._total

    def why_short(self) -> str:
        """Why there is no more text, for a message."""
        return "data.store_limit_gib is reached" if self.train.full else "the text has no more"

    def close(self) -> None:
        """End the preparation."""
        self._preparation.close()

    def _is_ready(self, number: int) -> bool:
        self.train.refresh()
        return self.train.is_complete or len(self.train.entries) >= (number + 1) * self._plan.window

    def _shards(self, number: int) -> range:
        """The shards of a window that is ready; none after the end of the text."""
        window, shards = self._plan.window, len(self.train.entries)
        count = -(-shards // window)
        if self.train.is_complete and number >= count:
            if self._repeat and self.train.full:
                raise SettingError(
                    "data.store_limit_gib is reached, so that data.repeat would repeat a part of the text; allowed: "
                    "a higher limit or null, or data.repeat=false"
                )
            if not (self._repeat and count):
                return range(0)
            number %= count
        return range(number * window, min((number + 1) * window, shards))
