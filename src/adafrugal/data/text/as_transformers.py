"""A run's tokenizer as the files that transformers' `AutoTokenizer` reads.

They give the ids that the run trained on: a text yields no special token, whatever it spells, and nothing is added at
its ends. What cannot be kept: a unigram model of SentencePiece adds scores in float32, the tokenizers library in
float64, so that of two ways to cut a word whose scores are equal to the last digits each may take another; and where a
text spells the token that closes a document, a tokenizer of the hub may cut the spelling otherwise.
"""

from __future__ import annotations

import tempfile
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from adafrugal.data.text.tokenizer import PretrainedTokenizer, SentencePieceTokenizer, Tokenizer

if TYPE_CHECKING:
    import tokenizers
    from sentencepiece.sentencepiece_model_pb2 import ModelProto
    from transformers import PreTrainedTokenizerBase

BPE = 2  # of SentencePiece's kinds of models
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # of its kinds of pieces
AWKWARD = (
    "", " ", " a", "a ", "  a  b  ", "\n", "a\n\n b\t", "\tdef f(x):\n    return x\r\n", "a\0b", "e\u0301\u0301",
    "\u0301", "漢字かな", "한국어", "Tiếng Việt", "😀👩‍👩‍👧", "\u00a0\u200b\ufeff\u2028", "ﬁ ＡＢＣ ①", "▁a▁▁b",
    "\ue000\U0010ffff", "<unk></s><pad> <s>", "<0x41><0x0A>", "-----=====", "aaaa bbbb", "1,234.5e-6",
)  # fmt: skip
PIECES_AT_ONCE = 200  # in a text to compare


class Exported(NamedTuple):
    """A tokenizer in transformers' form."""

    files: dict[str, bytes]  # by name
    differs: str | None  # a text to which they give other ids than the run; None if none was found


def export(made: Tokenizer, normalization: str = "none") -> Exported:
    """Return tokenizer.json and tokenizer_config.json, and with them SentencePiece's own file, if it is its model.

    Args:
        made: the run's tokenizer.
        normalization: none, nfc or nfkc, which the run applies to its text first; part of the files.
    """
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    if isinstance(made, SentencePieceTokenizer):
        own, backend = {"tokenizer.model": made.serialized}, _of_sentencepiece(made.serialized)
    else:
        assert isinstance(made, PretrainedTokenizer)
        own, backend = {}, tokenizers.Tokenizer.from_str(made.described)
    if normalization != "none":
        form = getattr(tokenizers.normalizers, normalization.upper())()
        backend.normalizer = tokenizers.normalizers.Sequence([form, *filter(None, [backend.normalizer])])
    end, pad = (backend.id_to_token(number) for number in (made.end, made.pad))
    found = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=end, pad_token=pad, split_special_tokens=True,
        clean_up_tokenization_spaces=False, model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    for text in (*AWKWARD, *filter(None, (end, pad)), *_of_pieces(made)):
        form = text if normalization == "none" else unicodedata.normalize(normalization.upper(), text)
        if found.encode(text) != made.encode([form])[0][:-1].tolist():
            return Exported(saved(found) | own, text)
    return Exported(saved(found) | own, None)


def saved(tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """Return the files that `save_pretrained` writes, by name, without its directory of more chat templates."""
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        return {file.name: file.read_bytes() for file in sorted(Path(directory).iterdir()) if file.is_file()}


def _of_pieces(made: Tokenizer) -> Iterator[str]:
    """Yield texts that together have every piece of a SentencePiece model, which alone is converted."""
    for first in range(0, made.size if isinstance(made, SentencePieceTokenizer) else 0, PIECES_AT_ONCE):
        yield made.decode(range(first, min(first + PIECES_AT_ONCE, made.size)))


def _of_sentencepiece(serialized: bytes) -> tokenizers.Tokenizer:
    """Return a SentencePiece model as a tokenizer of the tokenizers library."""
    import tokenizers
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    proto = ModelProto.FromString(serialized)
    found = tokenizers.Tokenizer(_bpe(proto) if proto.trainer_spec.model_type == BPE else _unigram(proto))
    found.normalizer = _normalizer(proto)
    decode = tokenizers.decoders
    start = [decode.Strip(" ", 1, 0)] if proto.normalizer_spec.add_dummy_prefix else []
    found.decoder = decode.Sequence([decode.Replace("▁", " "), decode.ByteFallback(), decode.Fuse(), *start])
    symbols = [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED]
    found.add_tokens([tokenizers.AddedToken(symbol, normalized=False) for symbol in symbols])
    return found


def _bpe(proto: ModelProto) -> Any:
    """Merge as SentencePiece does: of all pairs that make a piece, the one whose piece has the highest score."""
    from tokenizers.models import BPE as Model

    vocabulary = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    merges = [
        (-piece.score, i, len(piece.piece), piece.piece[:i], piece.piece[i:])
        for piece in proto.pieces
        if piece.type == NORMAL
        for i in range(1, len(piece.piece))
        if piece.piece[:i] in vocabulary and piece.piece[i:] in vocabulary
    ]
    pairs = [(left, right) for *_, left, right in sorted(merges)]
    spec = proto.trainer_spec
    return Model(vocabulary, pairs, unk_token=spec.unk_piece, fuse_unk=True, byte_fallback=spec.byte_fallback)


def _unigram(proto: ModelProto) -> Any:
    """Score pieces as SentencePiece does.

    The tokenizers library would find the names of special pieces and of bytes in text. Special ones are renamed with
    spaces, which no text has once spaces are marked; a byte, whose name has six characters, scores below six pieces.
    """
    from tokenizers.models import Unigram as Model

    lowest = min(piece.score for piece in proto.pieces if piece.type == NORMAL)

    def entry(piece: Any) -> tuple[str, float]:
        if piece.type in (UNKNOWN, CONTROL):
            return f" {piece.piece} ", piece.score
        return piece.piece, 10 * lowest if piece.type == BYTE else piece.score

    spec = proto.trainer_spec
    return Model([*map(entry, proto.pieces)], unk_id=spec.unk_id, byte_fallback=spec.byte_fallback)


def _normalizer(proto: ModelProto) -> Any:
    """Map characters, drop spaces, begin with a space, and mark spaces: each as far as the model does."""
    from tokenizers import Regex, normalizers

    spec, steps = proto.normalizer_spec, []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
