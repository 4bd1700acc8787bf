"""Select documents: parse each piece of a file, keep its text or skip it with a reason."""

from __future__ import annotations

import codecs
import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

INVALID = "\uffff"  # replaces bytes that are not UTF-8; a Unicode noncharacter

codecs.register_error("adafrugal_invalid", lambda error: (INVALID, error.end))


@dataclass(frozen=True)
class Rules:
    """Rules that select a split's documents from its files."""

    json_lines: bool  # each piece is a line of JSON; else it is the text
    text_field: str  # the key of the text in a line of JSON
    keep: Literal["all", "held_out", "rest"] = "all"  # all documents, those held out by hash, or the rest
    held_out: float = 0.0  # share of documents that is held out
    normalization: str = "none"  # of Unicode: none, nfc or nfkc


@dataclass
class Counts:
    """Numbers of pieces."""

    sound: int = 0  # selected or not
    skipped: Counter[str] = field(default_factory=Counter)  # by reason
    fields: list[str] = field(default_factory=list)  # keys of the first line of JSON without the text field


def digest(value: Any) -> str:
    """Return the SHA-256 of a value's JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


class _Broken(ValueError):
    """A piece without usable text; its arguments are the reason and the keys found instead of the text field."""


def select(pieces: Iterable[Any], rules: Rules) -> tuple[list[str], Counts]:
    """Return the selected documents among pieces of a file (str, None or undecoded bytes), and the counts."""
    texts, counts = [], Counts()
    for piece in pieces:
        try:
            text = _text(piece, rules)
        except _Broken as broken:
            reason, *fields = broken.args
            counts.skipped[reason] += 1
            counts.fields = counts.fields or fields
            continue
        counts.sound += 1
        if rules.keep != "all":
            is_held_out = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < rules.held_out * 2**64
            if is_held_out != (rules.keep == "held_out"):
                continue
        form = rules.normalization
        texts.append(text if form == "none" else unicodedata.normalize(form.upper(), text))
    return texts, counts


def _text(piece: Any, rules: Rules) -> str:
    if rules.json_lines:
        if INVALID in piece:
            raise _Broken("not UTF-8")
        if not piece.strip():
            raise _Broken("empty")
        try:
            value = json.loads(piece)
        except (ValueError, RecursionError):
            raise _Broken("not JSON") from None
        if not isinstance(value, dict):
            raise _Broken("no object")
        if rules.text_field not in value:
            raise _Broken(f"no field {rules.text_field!r}", *value)
        piece = value[rules.text_field]
    if not isinstance(piece, str):
        raise _Broken("not UTF-8" if isinstance(piece, bytes) else "no text")
    try:
        piece.encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON can encode
        raise _Broken("not UTF-8") from None
    if INVALID in piece or not piece.strip():
        raise _Broken("not UTF-8" if INVALID in piece else "empty")
    return piece
