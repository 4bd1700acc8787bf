import numpy as np
import pytest

from adafrugal.config import SettingError
from adafrugal.data import embedded, store


@pytest.fixture
def text(monkeypatch):
    """A corpus of two lines in place of megabytes; counts how often it is read."""
    calls = []

    def read():
        calls.append(1)
        words = [f"Document number {i} says something about tensors and arrays." for i in range(200)]
        return embedded.Corpus(words[:190], words[190:], "f" * 64)

    monkeypatch.setattr(embedded, "read", read)
    return calls


def test_it_is_made_once_and_read_ever_after(text, tmp_path):
    said = []
    first = store.prepare(300, "bpe", tmp_path, said.append)
    second = store.prepare(300, "bpe", tmp_path, said.append)
    assert len(text) == len(said) == 1
    assert np.array_equal(first.train, second.train)
    assert isinstance(second.train, np.memmap) and second.train.dtype == np.uint16
    assert first.fingerprint == second.fingerprint


def test_what_it_says_about_itself_is_so(text, tmp_path):
    found = store.prepare(300, "bpe", tmp_path, str)
    assert found.about["train"]["documents"] == 190
    assert found.about["train"]["tokens"] == len(found.train)
    ends = np.flatnonzero(found.train == found.tokenizer.end)
    assert len(ends) == 190
    first = found.tokenizer.decode(found.train[: ends[0]])
    assert first == "Document number 0 says something about tensors and arrays."
    lengths = found.tokenizer.byte_lengths()
    assert lengths[found.validation].sum() == found.about["validation"]["bytes"]


def test_another_tokenizer_is_another_store_with_another_fingerprint(text, tmp_path):
    a, b = store.prepare(300, "bpe", tmp_path, str), store.prepare(310, "bpe", tmp_path, str)
    assert a.fingerprint != b.fingerprint
    assert len(list(tmp_path.iterdir())) == 2


def test_what_an_interrupted_preparation_leaves_is_never_read(text, tmp_path, monkeypatch):
    def break_down(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(np, "save", break_down)
        with pytest.raises(KeyboardInterrupt):
            store.prepare(300, "bpe", tmp_path, str)
    assert not any(d.name.startswith("embedded") for d in tmp_path.iterdir())
    store.prepare(300, "bpe", tmp_path, str)
    assert len(text) == 2


def test_a_cache_that_cannot_be_written_is_one_line(text, tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(SettingError, match=r"cache_root is .*; choose a directory that can be written to"):
            store.prepare(300, "bpe", place, str)
