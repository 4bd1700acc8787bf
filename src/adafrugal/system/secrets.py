"""Keys that programs are given as environment variables: no record, copy or log shows them."""

from __future__ import annotations

import os
import re

_CALLED = re.compile(
    r"(^|_)(API|ACCESS|PRIVATE)?(KEY|TOKEN|SECRET|CREDENTIAL|PAT|PASS|PASSPHRASE)S?(_|$)|PASSWORD|PASSWD", re.IGNORECASE
)
_SHORTEST = 8  # characters; shorter values are switches and numbers


def named() -> dict[str, str]:
    """Each variable called a key, token, secret or password, with its value; existing paths are excluded."""
    called = {name: value for name, value in os.environ.items() if _CALLED.search(name)}
    is_path = os.path.exists  # which answers for any text, as Path's own does not
    return {name: value for name, value in called.items() if len(value) >= _SHORTEST and not is_path(value)}


def hidden(text: str) -> str:
    """The text with *** for each secret, also where line breaks of a secret were made spaces."""
    values = {form for value in named().values() for form in (value, " ".join(value.split()))}
    for value in sorted(values, key=len, reverse=True):  # one may be a part of another
        text = text.replace(value, "***")
    return text
