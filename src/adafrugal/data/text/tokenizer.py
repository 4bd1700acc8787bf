"""Tokenizers: SentencePiece models, trained or given, and fast tokenizers of transformers.

A trained or fetched tokenizer is a directory under `cache_root/tokenizers`:

    tokenizer.model   SentencePiece, or
    tokenizer.json    the tokenizers library
    tokenizer.yaml    the end id and the padding id
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adafrugal.system.errors import SettingError, line

LONGEST = 250_000  # characters of a SentencePiece training sentence; longer documents are split


class Tokenizer(ABC):
    """Encodes text as token ids and decodes them. Its pickle holds the content of its files."""

    size: int  # all ids are below it
    end: int  # the id that closes a document
    pad: int  # the padding id
    serialized: bytes  # all that its ids depend on
    _model: Any
    _made_of: tuple[Any, ...]  # arguments of __init__
    _files: dict[str, bytes]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._made_of

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of `serialized`."""
        return hashlib.sha256(self.serialized).hexdigest()

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        """The smallest type for its ids: uint16 if the vocabulary fits, else uint32."""
        return np.uint16 if self.size <= 2**16 else np.uint32

    def encode(self, documents: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each document followed by `end`; a special token's name is encoded as plain text."""
        return [np.append(ids, self.end).astype(self.dtype) for ids in self._ids(documents)]

    def encode_with_bytes(self, documents: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the ids as `encode` does, and the UTF-8 bytes of text of each token, int64 [tokens].

        A token's bytes are those from the previous token's end to its own; the last token also gets the rest. They add
        up to the document's bytes even if the tokenizer drops or replaces text. `end` has 0 bytes.
        """
        return [
            (np.append(ids, self.end).astype(self.dtype), np.append(_bytes_up_to(text, ends), 0))
            for text, (ids, ends) in zip(documents, self._ids_and_ends(documents), strict=True)
        ]

    def save(self, directory: Path) -> None:
        """Write the files that `load` reads."""
        for name, content in self._files.items():
            (directory / name).write_bytes(content)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without `end` and `pad`."""
        return self._model.decode([int(i) for i in ids if int(i) not in (self.end, self.pad)])

    @abstractmethod
    def _ids(self, documents: Sequence[str]) -> Iterable[Any]:
        """Return the ids of each document, without `end`."""

    @abstractmethod
    def _ids_and_ends(self, documents: Sequence[str]) -> Iterable[tuple[Any, Any]]:
        """Return the ids of each document, without `end`, and the character offset at which each token ends."""


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, given as the bytes of its file.

    Raises:
        SettingError: the bytes are no SentencePiece model, or the model has no end-of-sentence piece.
    """

    def __init__(self, model: bytes) -> None:
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise SettingError("data.tokenizer.name: the file is no SentencePiece model") from error
        self.serialized, self._made_of, self._files = model, (model,), {"tokenizer.model": model}
        self.size, self.end = self._model.get_piece_size(), self._model.eos_id()
        if self.end < 0:
            raise SettingError(
                "data.tokenizer.name: this SentencePiece model has no end-of-sentence piece to close documents with; "
                "train one that has (eos_id), or set data.tokenizer.kind=train"
            )
        self.pad = self._model.pad_id() if self._model.pad_id() >= 0 else self.end

    def _ids(self, documents: Sequence[str]) -> Iterable[Any]:
        return self._model.encode(list(documents), return_type="numpy", num_threads=1)

    def _ids_and_ends(self, documents: Sequence[str]) -> Iterable[tuple[Any, Any]]:
        for found in self._model.encode(list(documents), return_type="offset_mapping", num_threads=1):
            yield found["ids"], [end for _, end in found["offsets"]]


class PretrainedTokenizer(Tokenizer):
    """A tokenizer of the tokenizers library, given as its JSON; `of_transformers` makes one."""

    def __init__(self, described: str, end: int, pad: int) -> None:
        import tokenizers

        self._made_of, self.described = (described, end, pad), described
        self._files = {"tokenizer.json": described.encode(), "tokenizer.yaml": b"end: %d\npad: %d\n" % (end, pad)}
        self._model = tokenizers.Tokenizer.from_str(described)
        self._model.encode_special_tokens = True
        ids = self._model.get_vocab(with_added_tokens=True).values()
        self.size, self.end, self.pad = max(*ids, end, pad) + 1, end, pad
        self._inside = _inside([self._model.id_to_token(number) or "" for number in (end, pad)])
        self.serialized = json.dumps([described, end, pad]).encode()

    @classmethod
    def of_transformers(cls, name: str) -> PretrainedTokenizer:
        """Load the fast tokenizer of a hub repository or a directory; change it so that text yields no special tokens.

        Raises:
            SettingError: it has no fast form, no token to close a document, or added tokens that cannot be kept.
        """
        from transformers import AutoTokenizer

        named = f"data.tokenizer.name is {name}"
        try:
            found = AutoTokenizer.from_pretrained(name, use_fast=True, trust_remote_code=False)
        except (ValueError, ImportError) as error:
            raise SettingError(
                f"{named}, which has no tokenizer that transformers can read without code or packages of its own; "
                "allowed: tokenizers with a tokenizer.json"
            ) from error
        if not found.is_fast:
            raise SettingError(
                f"{named}, which has no tokenizer.json; allowed: tokenizers with one, or "
                "data.tokenizer.kind=sentencepiece and a .model file"
            )
        ends = [i for i in (found.eos_token_id, found.sep_token_id, found.bos_token_id) if i is not None]
        if not ends:
            raise SettingError(f"{named}, which has no token that could close a document")
        end, pad = ends[0], ends[0] if found.pad_token_id is None else found.pad_token_id
        made = cls(_without_specials(json.loads(found.backend_tokenizer.to_str()), (end, pad)), end, pad)
        added = found.get_added_vocab()
        for token in made._model.get_added_tokens_decoder().values():
            if made._model.token_to_id(token.content) != added.get(token.content):
                raise SettingError(
                    f"{named}, whose token {token.content!r} cannot be kept; allowed: tokenizers whose added tokens "
                    "are all special, or data.tokenizer.kind=train"
                )
        return made

    def _ids(self, documents: Sequence[str]) -> Iterable[Any]:
        found = self._model.encode_batch_fast(list(documents), add_special_tokens=False)
        for text, one in zip(documents, found, strict=True):
            yield next(self._ids_and_ends([text]))[0] if self._inside.search(text) else one.ids

    def _ids_and_ends(self, documents: Sequence[str]) -> Iterator[tuple[Any, Any]]:
        for text in documents:
            ids, ends, before = [], [], 0
            for part in self._inside.split(text):
                found = self._model.encode(part, add_special_tokens=False)
                ids += found.ids
                ends += [before + end for _, end in found.offsets]
                before += len(part)
            yield ids, ends


def load(directory: Path) -> Tokenizer:
    """Read the tokenizer that `save` wrote."""
    if (directory / "tokenizer.model").exists():
        return SentencePieceTokenizer((directory / "tokenizer.model").read_bytes())
    numbers = re.findall(r"\d+", (directory / "tokenizer.yaml").read_text())  # the end id and the padding id
    return PretrainedTokenizer((directory / "tokenizer.json").read_text(), *map(int, numbers))


def train(documents: Iterable[str], size: int, model_type: str, byte_fallback: bool = True) -> SentencePieceTokenizer:
    """Train a SentencePiece model of `size` pieces, "bpe" or "unigram", on documents.

    Ids follow T5: 0 padding, 1 end of document, 2 unknown. With `byte_fallback`, characters without a piece are encoded
    as bytes, so that no text is lost. Text is not normalized, so that diacritics stay and bytes can be counted.

    Raises:
        SettingError: `size` is too large for the text, or too small for its characters; the message has the limit.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(text[i : i + LONGEST] for text in documents for i in range(0, len(text), LONGEST)),
            model_writer=model, vocab_size=size, model_type=model_type, byte_fallback=byte_fallback,
            normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
            max_sentence_length=4 * LONGEST, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
            num_threads=1,  # the same model everywhere
        )  # fmt: skip
    except RuntimeError as error:
        reason = line(error)
        why = f"and SentencePiece refuses it: {reason}"
        if most := re.search(r"value <= (\d+)", reason):
            why = (
                f"which this text cannot fill; allowed: up to {most[1]} (300 or more are needed: for less, the text is "
                "too short to train a tokenizer on), or a larger data.tokenizer.sample_bytes where there is more text"
            )
        elif least := re.search(r"required_chars\. \d+ vs (\d+)", reason):
            why = f"and the text has more characters than that; allowed: {least[1]} or more"
        raise SettingError(f"data.tokenizer.vocabulary_size is {size}, {why}") from error
    return SentencePieceTokenizer(model.getvalue())


def _bytes_up_to(text: str, ends: Sequence[int]) -> np.ndarray:
    """Count the UTF-8 bytes of each token of a text, int64 [tokens], from the character offsets of the tokens' ends."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    sizes = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    bytes_before = np.concatenate([[0], np.cumsum(sizes)])
    reached = np.maximum.accumulate(bytes_before[np.asarray(ends, dtype=np.int64)])
    if len(reached):
        reached[-1] = bytes_before[-1]
    return np.diff(reached, prepend=0)


def _inside(names: Sequence[str]) -> re.Pattern[str]:
    """Return a pattern that splits a text after the first character of each of these names, so that none stays whole.

    Names that begin with a space come from `_without_specials` and match no text.
    """
    wanted = [name for name in names if len(name) > 1 and not name.startswith(" ")]
    splits = [f"(?<={re.escape(name[0])})(?={re.escape(name[1:])})" for name in wanted]
    return re.compile("|".join(splits) or r"(?!)")


def _without_specials(described: dict[str, Any], kept: Sequence[int]) -> str:
    """Return a tokenizer's JSON without the tokens added at the ends of a text, and without T5's sentinels.

    The sentinels are pieces of T5's unigram model, which finds them in text despite `encode_special_tokens`. Those at
    the end of the vocabulary are removed, so that its size covers only ids that can occur. The others are renamed with
    spaces, which no text has once spaces are marked. Ids in `kept` are not removed.
    """
    special = {token["id"] for token in described["added_tokens"] if token["special"]}
    model = described["model"]
    if model["type"] == "Unigram":
        pieces = model["vocab"]
        while len(pieces) - 1 in special - set(kept):
            pieces.pop()
        for number in special - {model.get("unk_id")}:
            if number < len(pieces) and not pieces[number][0].startswith(" "):  # in a checkpoint they are renamed
                pieces[number][0] = f" {pieces[number][0]} "
        described["added_tokens"] = [token for token in described["added_tokens"] if not token["special"]]
    described["post_processor"] = described["truncation"] = described["padding"] = None
    return json.dumps(described, ensure_ascii=False, sort_keys=True)
