"""Lines for a person, on stderr: without secrets, and without failing."""

from __future__ import annotations

import sys
from contextlib import suppress

from adafrugal.system.secrets import hidden


def tell(text: str) -> None:
    """Write a line, or several, to stderr; secrets are hidden, and a closed stream is no error."""
    with suppress(OSError):
        sys.stderr.write(f"{hidden(text)}\n")
        sys.stderr.flush()
