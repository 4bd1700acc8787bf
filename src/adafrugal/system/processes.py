"""Processes that work for this one: they leave signals to it, and end when it is gone."""

from __future__ import annotations

import importlib
import os
import sys
import threading
import time
from multiprocessing import Pipe, parent_process
from multiprocessing.connection import Connection, wait
from subprocess import DEVNULL, Popen, TimeoutExpired

from adafrugal.system.signals import leave_to_the_parent

_LOOKS_EVERY = 1.0  # seconds between two looks at whether the parent is there
_parent: int | None = None  # the process that a `Helper` works for


class Helper:
    """A Python process that runs `main(pipe)` of a module, by its full name.

    It is started by command rather than by multiprocessing, which would import the main program again. `pipe` is this
    end of its pipe, which ends when the process does; `quiet` drops what it prints.

    Raises:
        OSError: there is no memory for another process.
    """

    def __init__(self, module: str, quiet: bool = False) -> None:
        self.pipe, theirs = Pipe()
        given = f"{module!r}, {theirs.fileno()}, {os.getpid()}"
        code = f"from adafrugal.system import processes; processes.help_parent({given})"
        command = [sys.executable, "-P", "-c", code]  # -P: modules of the user's directory are not imported
        output, own = DEVNULL if quiet else None, [theirs.fileno()]
        with theirs:  # closed here, so that the pipe ends when the process does
            self.process = Popen(
                command, pass_fds=own, start_new_session=True, stdin=DEVNULL, stdout=output, stderr=output
            )

    def end(self, seconds: float) -> int | None:
        """Wait for the process to end; after so many seconds kill it. Its exit code, None where it was killed."""
        try:
            return self.process.wait(seconds)
        except TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return None


def help_parent(module: str, number: int, parent: int) -> None:
    """The process of a `Helper`; `number` is the file descriptor of its end of the pipe."""
    global _parent
    _parent = parent
    leave_to_the_parent()
    importlib.import_module(module).main(Connection(number))


def end_with_parent(grace: float = 0.0, pipe: Connection | None = None, gone: threading.Event | None = None) -> None:
    """In a `Helper` or a process of multiprocessing: end it when its parent is gone, whatever it is doing.

    Args:
        grace: seconds from then to the end.
        pipe: to the parent, which sends nothing more; its end counts as the parent's.
        gone: set as soon as the parent is gone.
    """
    parent = _parent or parent_process().pid  # os.getppid() may be another's by now
    pipes = [pipe] if pipe else []

    def watch() -> None:
        while os.getppid() == parent and not wait(pipes, _LOOKS_EVERY):
            pass
        if gone is not None:
            gone.set()
        time.sleep(grace)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent").start()
