"""Tokens on disk: made once for a text and a tokenizer, read through memory maps ever after."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adafrugal.config import SettingError
from adafrugal.data import embedded, tokenizer
from adafrugal.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenStore:
    """The tokens of a corpus, documents one after the other, each closed by the tokenizer's end id.

    Args:
        train, validation: unsigned integers [tokens], memory-mapped.
        tokenizer: what made them.
        about: documents, tokens and bytes of both parts, and the fingerprint that identifies text and tokenizer.
    """

    train: np.ndarray
    validation: np.ndarray
    tokenizer: Tokenizer
    about: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """The same text cut by the same tokenizer has the same fingerprint."""
        return self.about["fingerprint"]


def prepare(size: int, model_type: str, cache_root: Path, say: Callable[[str], None]) -> TokenStore:
    """The tokens of the embedded text, from the cache or, the first time, made and put there.

    Args:
        size: of the tokenizer, in pieces.
        model_type: "bpe" or "unigram".
        cache_root: where stores are kept.
        say: told, in a sentence, that this takes a while.

    A store appears under its name only when it is whole: what an interrupted preparation leaves is never read.

    Raises:
        SettingError: the cache cannot be written.
    """
    key = {"packages": embedded.versions(), "rules": embedded.VERSION, "tokenizer": [size, model_type]}
    directory = cache_root / f"embedded-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]}"
    if not directory.is_dir():
        say(f"preparing the embedded text, once: docstrings of {', '.join(embedded.PACKAGES)} → {directory}")
        try:
            cache_root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache_root, prefix=".preparing-") as scratch:
                whole = Path(scratch) / "store"
                whole.mkdir()
                _make(whole, size, model_type)
                _put(whole, directory)
        except OSError as error:
            reason = f"{error.strerror}; choose a directory that can be written to and has room"
            raise SettingError(f"cache_root is {cache_root}: {reason}") from error
    return _open(directory)


def _make(directory: Path, size: int, model_type: str) -> None:
    corpus = embedded.read()
    model = tokenizer.train(corpus.train, size, model_type)
    (directory / "tokenizer.model").write_bytes(model)
    about: dict[str, Any] = {
        "text": corpus.fingerprint,
        "fingerprint": hashlib.sha256(corpus.fingerprint.encode() + model).hexdigest(),
        "packages": embedded.versions(),
    }
    for part, documents in (("train", corpus.train), ("validation", corpus.validation)):
        tokens = np.concatenate(Tokenizer(model).encode(documents))
        np.save(directory / f"{part}.npy", tokens)
        read = sum(len(d.encode()) for d in documents)
        about[part] = {"documents": len(documents), "tokens": len(tokens), "bytes": read}
    (directory / "about.json").write_text(json.dumps(about, indent=2) + "\n")


def _put(whole: Path, directory: Path) -> None:
    try:
        whole.rename(directory)
    except OSError:
        if not directory.is_dir():  # else another process was first; its store is the same
            raise
        shutil.rmtree(whole)


def _open(directory: Path) -> TokenStore:
    return TokenStore(
        train=np.load(directory / "train.npy", mmap_mode="r"),
        validation=np.load(directory / "validation.npy", mmap_mode="r"),
        tokenizer=tokenizer.load(directory / "tokenizer.model"),
        about=json.loads((directory / "about.json").read_text()),
    )
