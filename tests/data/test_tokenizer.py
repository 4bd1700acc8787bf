import pytest

from adafrugal.config import SettingError
from adafrugal.data import tokenizer

NOUNS = ["tensor", "gradient", "matrix", "column", "moment", "optimizer", "token", "sentence", "model", "learning"]
VERBS = ["holds", "reads", "writes", "shrinks", "follows", "splits", "keeps", "releases"]
TEXT = [f"The {a} {verb} every {b}, and then the {b} waits." for a in NOUNS for verb in VERBS for b in NOUNS]
TEXT.append("Tiếng Việt có dấu; naïve café — ρ.")


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def trained(request):
    return tokenizer.Tokenizer(tokenizer.train(TEXT, 310, request.param))


def test_text_survives_and_every_document_is_closed(trained):
    texts = [*TEXT[-9:], "unseen: 漢字 😀 two  spaces", ""]
    for text, ids in zip(texts, trained.encode(texts), strict=True):
        assert ids[-1] == trained.end
        assert ids.max() < trained.size == 310
        assert trained.decode(ids[:-1]) == text


def test_byte_lengths_add_up_to_the_texts_bytes(trained):
    lengths = trained.byte_lengths()
    for text in [*TEXT[-9:], "unseen: 漢字 😀"]:
        assert lengths[trained.encode([text])[0]].sum() == len(text.encode())


def test_the_same_text_gives_the_same_model():
    assert tokenizer.train(TEXT, 300, "bpe") == tokenizer.train(TEXT, 300, "bpe")


def test_a_vocabulary_that_the_text_cannot_fill_is_one_line_with_the_limit():
    with pytest.raises(SettingError, match=r"data.tokenizer.vocabulary_size is 5000.*cannot fill.*<= \d+"):
        tokenizer.train(TEXT, 5000, "bpe")
