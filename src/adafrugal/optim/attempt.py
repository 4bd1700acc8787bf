"""One attempt at a step: whether it has begun, what happened in it, and what is left when it fails."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from adafrugal.optim import refresh
from adafrugal.optim.ambient import apart
from adafrugal.optim.kernels import tables
from adafrugal.optim.options import Clocks, Group
from adafrugal.optim.refresh import Event, Refresh


class Attempt:
    """The step in progress, of which no saved state knows.

    Its clocks and selections come first, its updates last: before, a failure takes the clocks back, and the next step
    makes what this one has not made; then a failure cannot be undone, and no step follows.
    """

    def __init__(self) -> None:
        self.has_begun = False  # clocks and subspaces have moved; tensors are updated, or about to be
        self.refreshed: set[int] = set()  # indices of groups whose refresh has begun
        self.events: dict[tuple[int, Event], Refresh] = {}  # also of failed attempts before it
        self._before: list[Clocks] = []
        self._failure = ""

    @contextmanager
    def whole(self, groups: Sequence[Group]) -> Iterator[None]:
        """Make a step, or the next part of one that has begun, in none of the caller's modes.

        Raises:
            RuntimeError: the step before failed amid its updates.
        """
        if self._failure:
            raise RuntimeError(f"{self._failure}: load a saved state of model and optimizer")
        if not self.has_begun:
            self._before, self.refreshed = [refresh.clocks(group) for group in groups], set()
        try:
            with apart():
                yield
        except BaseException as error:  # KeyboardInterrupt too
            if self.has_begun and not tables.is_recording():  # what is recorded has not been done
                what = f"step {groups[0]['steps']} failed amid its updates ({type(error).__name__})"
                self._failure = f"{what}, so that some tensors have moved and others have not"
            else:
                for index, (group, before) in enumerate(zip(groups, self._before, strict=True)):
                    refresh.take_back(group, before, has_begun=index in self.refreshed)
            self.has_begun = False
            raise

    def warn_of_failure(self) -> None:
        """Warn that a state that is read now is of no step."""
        if self._failure:
            warnings.warn(f"{self._failure}: a state saved now is half of this step's", stacklevel=3)

    def end(self) -> list[Refresh]:
        """End the step; return its events."""
        events, self.events, self.has_begun = list(self.events.values()), {}, False
        return events
