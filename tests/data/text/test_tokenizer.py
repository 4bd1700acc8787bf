import io

import numpy as np
import pytest
import sentencepiece
import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from adafrugal.data.text import tokenizer
from adafrugal.system.errors import SettingError

NOUNS = ["tensor", "gradient", "matrix", "column", "moment", "optimizer", "token", "sentence", "model", "learning"]
VERBS = ["holds", "reads", "writes", "shrinks", "follows", "splits", "keeps", "releases"]
TEXT = [f"The {a} {verb} every {b}, and then the {b} waits." for a in NOUNS for verb in VERBS for b in NOUNS]
TEXT.append("Tiếng Việt có dấu; naïve café — ρ.")


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def trained(request):
    return tokenizer.train(TEXT, 310, request.param)


def test_text_survives_and_every_document_is_closed(trained):
    texts = [*TEXT[-9:], "unseen: 漢字 😀 two  spaces", ""]
    for text, ids in zip(texts, trained.encode(texts), strict=True):
        assert ids[-1] == trained.end
        assert ids.max() < trained.size == 310
        assert trained.decode(ids[:-1]) == text


def test_the_bytes_of_the_tokens_add_up_to_the_texts(trained):
    for text in [*TEXT[-9:], "unseen: 漢字 😀", "x"]:
        ((ids, counts),) = trained.encode_with_bytes([text])
        assert np.array_equal(ids, trained.encode([text])[0])
        assert len(counts) == len(ids) and counts[-1] == 0
        assert counts.sum() == len(text.encode())
        assert (counts >= 0).all()


def test_each_token_has_the_bytes_of_its_own_piece(trained):
    ((ids, counts),) = trained.encode_with_bytes(["The tensor holds café."])
    pieces = [trained.decode([i]) for i in ids[:-1]]
    whole = [(piece, count) for piece, count in zip(pieces, counts, strict=False) if piece.isascii() and piece.strip()]
    assert len(whole) > 3
    for piece, count in whole:
        assert count - len(piece) in (0, 1), "the space before a word is part of its piece, and decoding drops it"


def test_the_same_text_gives_the_same_model():
    first, second = (tokenizer.train(TEXT, 300, "bpe").fingerprint for _ in range(2))
    assert first == second != tokenizer.train(TEXT, 301, "bpe").fingerprint


def test_a_vocabulary_that_the_text_cannot_fill_is_one_line_with_the_limit():
    with pytest.raises(SettingError, match=r"vocabulary_size is 5000, which .* cannot fill; allowed: up to \d+ "):
        tokenizer.train(TEXT, 5000, "bpe")


def test_without_byte_fallback_unseen_text_is_unknown_and_still_counted():
    found = tokenizer.train(TEXT, 60, "bpe", byte_fallback=False)
    ((ids, counts),) = found.encode_with_bytes(["漢字"])
    assert counts.sum() == 6
    assert found.decode(ids[:-1]) != "漢字"


def test_a_saved_tokenizer_cuts_the_same(trained, tmp_path):
    trained.save(tmp_path)
    again = tokenizer.load(tmp_path)
    assert again.fingerprint == trained.fingerprint
    assert [a.tolist() for a in again.encode(TEXT[:9])] == [a.tolist() for a in trained.encode(TEXT[:9])]


def test_a_file_that_is_no_model_is_one_line():
    with pytest.raises(SettingError, match=r"data.tokenizer.name: the file is no SentencePiece model"):
        tokenizer.SentencePieceTokenizer(b"no model")


def test_a_model_that_closes_no_sentence_is_one_line():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=model, vocab_size=50, eos_id=-1, minloglevel=2
    )
    with pytest.raises(SettingError, match=r"no end-of-sentence piece.*data.tokenizer.kind=train"):
        tokenizer.SentencePieceTokenizer(model.getvalue())


# -- transformers' ----------------------------------------------------------------------------------------------------


@pytest.fixture
def like_t5(tmp_path):
    """A directory with a tokenizer made as T5's is: unigram, specials and sentinels among its pieces, all special."""
    specials = ["<pad>", "</s>", "<unk>"]
    sentinels = [f"<extra_id_{i}>" for i in range(3)]
    letters = sorted({*"▁abcdefghijklmnopqrstuvwxyz/<>_0123456789"})
    pieces = [(s, 0.0) for s in specials] + [(c, -5.0) for c in letters] + [("▁the", -2.0)]
    pieces += [(s, 0.0) for s in sentinels]
    made = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.decoder = tokenizers.decoders.Metaspace()
    made.add_special_tokens([*specials, *sentinels])
    place = tmp_path / "like-t5"
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", extra_special_tokens=sentinels
    )
    fast.save_pretrained(place)
    return place, len(pieces) - len(sentinels)


def test_sentinels_are_ordinary_text_and_do_not_count(like_t5):
    place, size = like_t5
    found = tokenizer.PretrainedTokenizer.of_transformers(str(place))
    assert found.size == size and (found.end, found.pad) == (1, 0)
    text = "the <extra_id_1> and </s> and <pad>"
    (ids,) = found.encode([text])
    assert ids[-1] == found.end and ids.max() < size
    assert not set(ids[:-1].tolist()) & {0, 1, 2}, "text that reads like a special token is only text"
    assert found.decode(ids) == text


def test_ordinary_text_is_cut_as_transformers_cuts_it(like_t5):
    place, _ = like_t5
    found, theirs = tokenizer.PretrainedTokenizer.of_transformers(str(place)), AutoTokenizer.from_pretrained(place)
    for text in ("the cat and the dog", "x  y", "Unseen Ω letters"):
        assert found.encode([text])[0][:-1].tolist() == theirs(text, add_special_tokens=False)["input_ids"]


def test_bytes_of_dropped_and_unknown_text_are_counted(like_t5):
    found = tokenizer.PretrainedTokenizer.of_transformers(str(like_t5[0]))
    for text in ("the  cat", "Ω is unknown ", "\n the 漢字😀"):
        ((ids, counts),) = found.encode_with_bytes([text])
        assert counts.sum() == len(text.encode()) and len(ids) == len(counts)


@pytest.fixture
def byte_level(tmp_path):
    """A directory with a byte-level BPE tokenizer, as GPT-2's descendants have: specials before an added token."""
    vocabulary = {c: i for i, c in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<|pad|>", "<|end|>"])
    made.add_tokens(["<tool>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<|pad|>", eos_token="<|end|>")
    fast.save_pretrained(tmp_path / "byte-level")
    return tmp_path / "byte-level"


def test_added_tokens_keep_their_numbers_and_specials_are_only_text(byte_level):
    found = tokenizer.PretrainedTokenizer.of_transformers(str(byte_level))
    theirs = AutoTokenizer.from_pretrained(byte_level)
    assert (found.pad, found.end, found.size) == (256, 257, 259)
    for text in ("a<tool>b", "plain"):
        assert found.encode([text])[0][:-1].tolist() == theirs(text, add_special_tokens=False)["input_ids"]
    text = "an <|end|> and a <|pad|>"
    (ids,) = found.encode([text])
    assert not {256, 257} & set(ids[:-1].tolist())
    assert found.decode(ids) == text


def test_words_that_are_special_are_only_text_where_spaces_divide_words(tmp_path):
    words = ["[PAD]", "[SEP]", "[UNK]", "a", "b", *"[]SEPAD", *(f"##{c}" for c in "[]SEPAD")]
    model = tokenizers.models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", sep_token="[SEP]", unk_token="[UNK]"
    )  # fmt: skip
    fast.save_pretrained(tmp_path)
    found = tokenizer.PretrainedTokenizer.of_transformers(str(tmp_path))
    ((ids, counts),) = found.encode_with_bytes(["a [SEP] b [PAD]"])
    assert ids.tolist() == found.encode(["a [SEP] b [PAD]"])[0].tolist()
    assert not {0, 1} & set(ids[:-1].tolist()) and ids[-1] == found.end == 1
    assert counts.sum() == len("a [SEP] b [PAD]")


def test_a_vocabulary_that_is_too_small_for_the_characters_says_how_many_there_are():
    with pytest.raises(SettingError, match=r"is 300, and the text has more characters than that; allowed: \d+ or more"):
        tokenizer.train(["".join(map(chr, range(0x4E00, 0x4F00))) * 20], 300, "bpe")


def test_a_document_longer_than_sentencepiece_takes_trains_all_the_same():
    found = tokenizer.train([" ".join(TEXT) * 40], 310, "bpe")
    assert found.size == 310


def test_a_pretrained_tokenizer_is_saved_and_read(like_t5, tmp_path):
    found = tokenizer.PretrainedTokenizer.of_transformers(str(like_t5[0]))
    (tmp_path / "kept").mkdir()
    found.save(tmp_path / "kept")
    again = tokenizer.load(tmp_path / "kept")
    assert (again.size, again.end, again.pad, again.fingerprint) == (
        found.size, found.end, found.pad, found.fingerprint
    )  # fmt: skip


def test_a_tokenizer_of_many_pieces_needs_four_bytes_a_token(trained):
    assert trained.dtype is np.uint16
    trained.size, before = 70_000, trained.size
    assert trained.dtype is np.uint32
    trained.size = before
