"""SentencePiece tokenizers: training one on a corpus, and reading text with it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from adafrugal.config import SettingError

SAMPLE_BYTES = 2_000_000  # of text that a tokenizer is trained on; more changes few pieces and costs minutes


class Tokenizer:
    """A SentencePiece model. Ids are below `size`; `end` is the id that closes a document."""

    def __init__(self, model: bytes) -> None:
        self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.size = self._model.get_piece_size()
        self.end = self._model.eos_id()

    def encode(self, documents: Sequence[str]) -> list[np.ndarray]:
        """The ids of each document with `end` after it, uint16 where the vocabulary fits, else uint32."""
        kind = np.uint16 if self.size <= 2**16 else np.uint32
        encoded = self._model.encode(list(documents), out_type=int, add_eos=True)
        return [np.asarray(ids, dtype=kind) for ids in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids."""
        return self._model.decode([int(i) for i in ids])

    def byte_lengths(self) -> np.ndarray:
        """Bytes of UTF-8 that each id stands for, int64 [size]; 0 for ids that stand for no text."""
        return np.array([self._bytes(i) for i in range(self.size)], dtype=np.int64)

    def _bytes(self, number: int) -> int:
        if self._model.is_control(number) or self._model.is_unknown(number):
            return 0
        if self._model.is_byte(number):
            return 1
        return len(self._model.id_to_piece(number).replace("▁", " ").encode())


def train(documents: Sequence[str], size: int, model_type: str) -> bytes:
    """A SentencePiece model of `size` pieces, "bpe" or "unigram", trained on a sample spread over all documents.

    Ids as T5 has them: 0 padding, 1 end of document, 2 unknown. Bytes that no piece covers are spelt out, so that
    no text is lost, and nothing is normalised, so that bytes can be counted.

    Raises:
        SettingError: the text cannot fill the vocabulary; the message has the size that it could fill.
    """
    total = sum(len(d.encode()) for d in documents)
    every = max(1, -(-total // SAMPLE_BYTES))
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(documents[::every]),
            model_writer=model,
            vocab_size=size,
            model_type=model_type,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            max_sentence_length=1_000_000,
            num_threads=1,  # the same model everywhere
            pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
            minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise SettingError(
            f"data.tokenizer.vocabulary_size is {size}, which this text cannot fill: {reason}"
        ) from error
    return model.getvalue()


def load(file: Path) -> Tokenizer:
    """The tokenizer of a SentencePiece `.model` file."""
    return Tokenizer(file.read_bytes())
