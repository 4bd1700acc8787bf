"""From what a file holds to documents: parse, keep or skip, each with the reason."""

from __future__ import annotations

import codecs
import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

INVALID = "\uffff"  # stands for bytes that are not UTF-8; Unicode keeps this code point free of characters

codecs.register_error("adafrugal_invalid", lambda error: (INVALID, error.end))


@dataclass(frozen=True)
class Rules:
    """What of a part of a corpus is a document of it.

    Args:
        json_lines: each piece read is a line of JSON; else it is the text itself.
        text_field: the name of the text in a line of JSON.
        keep: all documents, those that are held out by their hash, or the others.
        held_out: the share that is held out.
        normalization: of Unicode: none, nfc, nfkc.
    """

    json_lines: bool
    text_field: str
    keep: Literal["all", "held_out", "rest"] = "all"
    held_out: float = 0.0
    normalization: str = "none"


@dataclass
class Documents:
    """Some documents, and how many pieces gave none.

    Args:
        texts: the documents.
        sound: how many pieces held text, whether it is kept or not.
        skipped: reason -> pieces.
        fields: of the first line of JSON without the text field, for a message.
    """

    texts: list[str] = field(default_factory=list)
    sound: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    fields: list[str] = field(default_factory=list)


def select(pieces: Iterable[Any], rules: Rules) -> Documents:
    """The documents in pieces of a file (str, None, or undecoded bytes); a broken piece is counted and left out."""
    found = Documents()
    for piece in pieces:
        text = _from_json(piece, rules.text_field, found) if rules.json_lines else piece
        reason = _broken(text)
        if reason:
            found.skipped[reason] += 1
            continue
        found.sound += 1
        if _is_kept(text, rules):
            found.texts.append(_normalized(text, rules.normalization))
    return found


def _from_json(line: str, name: str, found: Documents) -> Any:
    """The text in a line of JSON, or the reason why there is none as a `_Reason`."""
    if INVALID in line:
        return _Reason("not UTF-8")
    if not line.strip():
        return _Reason("empty")
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return _Reason("not JSON")
    if not isinstance(value, dict):
        return _Reason("no object")
    if name not in value:
        found.fields = found.fields or list(value)
        return _Reason(f"no field {name!r}")
    return value[name]


class _Reason(str):
    """Why there is no text."""


def _broken(text: Any) -> str | None:
    if isinstance(text, _Reason):
        return str(text)
    if isinstance(text, bytes) or (isinstance(text, str) and INVALID in text):
        return "not UTF-8"
    if not isinstance(text, str):
        return "no text"
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        return "not UTF-8"
    return None if text.strip() else "empty"


def _is_kept(text: str, rules: Rules) -> bool:
    if rules.keep == "all":
        return True
    digest = hashlib.sha256(text.encode()).digest()
    held_out = int.from_bytes(digest[:8], "big") < rules.held_out * 2**64
    return held_out == (rules.keep == "held_out")


def _normalized(text: str, form: str) -> str:
    return text if form == "none" else unicodedata.normalize(form.upper(), text)
