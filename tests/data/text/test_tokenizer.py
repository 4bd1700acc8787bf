import io
import pickle

import numpy as np
import pytest
import sentencepiece
import tokenizers
from transformers import PreTrainedTokenizerFast

from adafrugal.data.text import tokenizer
from adafrugal.data.text.tokenizer import PretrainedTokenizer
from adafrugal.system.errors import SettingError

NOUNS = ["tensor", "gradient", "matrix", "column", "moment", "optimizer", "token", "sentence", "model", "learning"]
VERBS = ["holds", "reads", "writes", "shrinks", "follows", "splits", "keeps", "releases"]
TEXT = [f"The {a} {verb} every {b}, and then the {b} waits." for a in NOUNS for verb in VERBS for b in NOUNS]
TEXT.append("Tiếng Việt có dấu; naïve café — ρ.")


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def trained(request):
    return tokenizer.train(TEXT, 310, request.param)


def same(first, second):
    """Whether two tokenizers are one, and cut alike."""
    assert all(getattr(first, name) == getattr(second, name) for name in ("size", "end", "pad", "fingerprint"))
    assert [a.tolist() for a in first.encode(TEXT[:9])] == [b.tolist() for b in second.encode(TEXT[:9])]


def test_text_survives_every_document_is_closed_and_the_bytes_of_the_tokens_add_up(trained):
    texts = [*TEXT[-9:], "unseen: 漢字 😀 two  spaces", "x", ""]
    for text, ids, (again, counts) in zip(texts, trained.encode(texts), trained.encode_with_bytes(texts), strict=True):
        assert ids[-1] == trained.end and ids.max() < trained.size == 310
        assert trained.decode(ids[:-1]) == text
        assert np.array_equal(ids, again) and len(counts) == len(ids) and counts[-1] == 0
        assert counts.sum() == len(text.encode()) and (counts >= 0).all()


def test_each_token_has_the_bytes_of_its_own_piece(trained):
    ((ids, counts),) = trained.encode_with_bytes(["The tensor holds café."])
    pieces = [trained.decode([i]) for i in ids[:-1]]
    whole = [(piece, count) for piece, count in zip(pieces, counts, strict=False) if piece.isascii() and piece.strip()]
    assert len(whole) > 3
    for piece, count in whole:
        assert count - len(piece) in (0, 1), "the space before a word is part of its piece, and decoding drops it"


def test_the_same_text_gives_the_same_model_however_long_its_documents_are():
    first, second, other = (tokenizer.train(TEXT, size, "bpe").fingerprint for size in (300, 300, 301))
    assert first == second != other
    assert tokenizer.train([" ".join(TEXT) * 40], 310, "bpe").size == 310


def test_without_byte_fallback_unseen_text_is_unknown_and_still_counted():
    found = tokenizer.train(TEXT, 60, "bpe", byte_fallback=False)
    ((ids, counts),) = found.encode_with_bytes(["漢字"])
    assert counts.sum() == 6 and found.decode(ids[:-1]) != "漢字"


def test_a_saved_or_pickled_tokenizer_is_the_same(trained, like_t5, tmp_path):
    for name, made in (("trained", trained), ("pretrained", like_t5[1])):
        (tmp_path / name).mkdir()
        made.save(tmp_path / name)
        same(made, tokenizer.load(tmp_path / name))
        same(made, pickle.loads(pickle.dumps(made)))


def endless():
    """A model without an end-of-sentence piece."""
    how = {"vocab_size": 50, "eos_id": -1, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXT), model_writer=(model := io.BytesIO()), **how)
    return model.getvalue()


HAN = "".join(map(chr, range(0x4E00, 0x4F00))) * 20


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tokenizer.train(TEXT, 5000, "bpe"), r"_size is 5000, which .* cannot fill; allowed: up to \d+ "),
        (lambda: tokenizer.train([HAN], 300, "bpe"), r"more characters than that; allowed: \d+ or more"),
        (lambda: tokenizer.SentencePieceTokenizer(b"no model"), "tokenizer.name: the file is no SentencePiece model"),
        (lambda: tokenizer.SentencePieceTokenizer(endless()), r"no end-of-sentence piece.*data.tokenizer.kind=train"),
    ],
)
def test_a_vocabulary_or_a_model_that_cannot_be_used_is_one_line(make, message):
    with pytest.raises(SettingError, match=message):
        make()


def test_a_tokenizer_of_many_pieces_needs_four_bytes_a_token(trained, monkeypatch):
    assert trained.dtype is np.uint16
    monkeypatch.setattr(trained, "size", 70_000)
    assert trained.dtype is np.uint32


# -- transformers' ----------------------------------------------------------------------------------------------------


def saved(made, directory, **names):
    """The tokenizer as transformers has it, and as ours once it is saved."""
    theirs = PreTrainedTokenizerFast(tokenizer_object=made, **names)
    theirs.save_pretrained(directory)
    return theirs, PretrainedTokenizer.of_transformers(str(directory))


@pytest.fixture
def like_t5(tmp_path):
    """A tokenizer made as T5's is: unigram, specials and sentinels among its pieces, all special; theirs and ours."""
    specials = ["<pad>", "</s>", "<unk>"]
    sentinels = [f"<extra_id_{i}>" for i in range(3)]
    letters = sorted({*"▁abcdefghijklmnopqrstuvwxyz/<>_0123456789"})
    pieces = [(s, 0.0) for s in specials] + [(c, -5.0) for c in letters] + [("▁the", -2.0)]
    pieces += [(s, 0.0) for s in sentinels]
    made = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.decoder = tokenizers.decoders.Metaspace()
    made.add_special_tokens([*specials, *sentinels])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "extra_special_tokens": sentinels}
    return saved(made, tmp_path / "like-t5", **names)


def test_sentinels_are_ordinary_text_and_do_not_count(like_t5):
    theirs, found = like_t5
    size = len(theirs) - 3
    assert found.size == size and (found.end, found.pad) == (1, 0)
    text = "the <extra_id_1> and </s> and <pad>"
    (ids,) = found.encode([text])
    assert ids[-1] == found.end and ids.max() < size
    assert not set(ids[:-1].tolist()) & {0, 1, 2}, "text that reads like a special token is only text"
    assert found.decode(ids) == text
    for text in ("the cat and the dog", "x  y", "Unseen Ω letters"):
        assert found.encode([text])[0][:-1].tolist() == theirs(text, add_special_tokens=False)["input_ids"]
    for text in ("the  cat", "Ω is unknown ", "\n the 漢字😀"):  # bytes of dropped and unknown text are counted
        ((ids, counts),) = found.encode_with_bytes([text])
        assert counts.sum() == len(text.encode()) and len(ids) == len(counts)


def test_added_tokens_keep_their_numbers_and_specials_are_only_text(tmp_path):
    """Of byte-level BPE, as GPT-2's descendants have it: specials before an added token."""
    vocabulary = {c: i for i, c in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<|pad|>", "<|end|>"])
    made.add_tokens(["<tool>"])
    theirs, found = saved(made, tmp_path, pad_token="<|pad|>", eos_token="<|end|>")
    assert (found.pad, found.end, found.size) == (256, 257, 259)
    for text in ("a<tool>b", "plain"):
        assert found.encode([text])[0][:-1].tolist() == theirs(text, add_special_tokens=False)["input_ids"]
    text = "an <|end|> and a <|pad|>"
    (ids,) = found.encode([text])
    assert not {256, 257} & set(ids[:-1].tolist())
    assert found.decode(ids) == text


def test_special_words_are_only_text_where_spaces_divide_words(tmp_path):
    words = ["[PAD]", "[SEP]", "[UNK]", "a", "b", *"[]SEPAD", *(f"##{c}" for c in "[]SEPAD")]
    model = tokenizers.models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    _, found = saved(made, tmp_path, pad_token="[PAD]", sep_token="[SEP]", unk_token="[UNK]")
    text = "a [SEP] b [PAD]"
    ((ids, counts),) = found.encode_with_bytes([text])
    assert ids.tolist() == found.encode([text])[0].tolist()
    assert not {0, 1} & set(ids[:-1].tolist()) and ids[-1] == found.end == 1
    assert counts.sum() == len(text)
