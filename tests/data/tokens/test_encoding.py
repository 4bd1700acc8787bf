import json

import numpy as np
import pytest
from corpora import texts_of

from adafrugal.data.text import tokenizer
from adafrugal.data.text.sources import Position
from adafrugal.data.tokens import encoding
from adafrugal.data.tokens.encoding import Cutting
from adafrugal.system.errors import SettingError


def made(plan, begin=Position(), tokens=10_000, processes=1, part="train", **more):  # noqa: B008 - a frozen value
    with Cutting(plan.tokenizer_at, processes) as cutting:
        return list(encoding.make(plan.source, getattr(plan.source, part), cutting, begin, tokens, **more))


def documents(found, cutter):
    for shard in found:
        for begin, end in zip(np.concatenate([[0], shard.ends[:-1]]), shard.ends, strict=True):
            yield cutter.decode(shard.tokens[begin : end - 1])
            assert shard.tokens[end - 1] == cutter.end


def test_every_document_is_there_once_and_in_order(plan):
    wanted = plan()
    found = made(wanted)
    cutter = tokenizer.load(wanted.tokenizer_at)
    texts = [text for file in wanted.source.train.files for text in texts_of(file)]
    assert len(texts) == 600
    assert list(documents(found, cutter)) == texts
    assert sum(shard.text_bytes for shard in found) == sum(len(t.encode()) for t in texts)
    assert len(found) > 3
    assert all(len(shard.tokens) >= 10_000 for shard in found[:-1])


def same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert np.array_equal(a.tokens, b.tokens) and np.array_equal(a.ends, b.ends)
        assert a.after == b.after and a.skipped == b.skipped and a.text_bytes == b.text_bytes


def test_the_number_of_processes_changes_nothing(plan):
    wanted = plan()
    same(made(wanted), made(wanted, processes=2))


def test_going_on_where_a_shard_ended_gives_the_shards_that_were_to_come(plan):
    wanted = plan()
    everything = made(wanted)
    for number in range(len(everything)):
        same(made(wanted, begin=everything[number].after), everything[number + 1 :])


def test_bytes_are_counted_where_they_are_wanted(plan):
    wanted = plan()
    (found,) = made(wanted, part="validation", tokens=10**6, count_bytes=True)
    assert found.token_bytes.sum() == found.text_bytes
    assert made(wanted)[0].token_bytes is None


def test_nothing_beyond_the_vocabulary_comes_out(plan, monkeypatch):
    wanted = plan()
    monkeypatch.setattr(tokenizer.SentencePieceTokenizer, "_ids", lambda self, texts: [[400] for _ in texts])
    with pytest.raises(SettingError, match="the id 400, beyond its vocabulary of 320"):
        made(wanted)


@pytest.fixture
def lines(tmp_path, corpus_settings, plan):
    """A function that gives the plan of a .jsonl file of the given lines."""

    def make(written, **more):
        file = tmp_path / "lines.jsonl"
        file.write_bytes(b"".join(line if isinstance(line, bytes) else f"{line}\n".encode() for line in written))
        return plan(corpus_settings(source=str(file), subset=None, held_out=0.05, **more))

    return make


def line(i):
    return json.dumps({"text": f"sentence {i} of several words"})


def test_a_single_broken_document_is_skipped_and_counted(lines):
    wanted = lines([*map(line, range(300)), '{"text": "bro', b'{"text": "\xff\xfe"}\n', *map(line, range(300, 400))])
    (found,) = made(wanted)
    assert found.skipped == {"not JSON": 1, "not UTF-8": 1}
    assert len(found.ends) > 370


def test_a_file_of_broken_documents_is_refused_in_one_line(lines):
    wanted = lines([*map(line, range(20)), *(f'{{"text": "latin caf\\xe9 {i}"}}\n'.encode("latin-1")
                                             .replace(b"\\xe9", b"\xe9") for i in range(400))])  # fmt: skip
    with pytest.raises(SettingError, match=r"documents are broken \(\d+: not UTF-8\).*1%.*convert the files to UTF-8"):
        made(wanted)


def test_a_missing_field_is_one_line_with_those_that_are_there(lines):
    wanted = lines(['{"content": "x", "id": 1}'] * 300)
    with pytest.raises(SettingError, match=r"data.text_field is text, which .*lines.* does not have; .*content, id"):
        made(wanted)


def test_broken_documents_are_weighed_against_all_and_not_against_those_held_out(lines):
    broken = ['{"text": "bro'] * 15
    wanted = lines([*map(line, range(2500)), *broken, *map(line, range(2500, 3000))])
    (found,) = made(wanted, part="validation", tokens=10**6)
    assert found.skipped == {"not JSON": 15} and len(found.ends) < 250
    without_field = lines([*map(line, range(100)), '{"content": "x"}', *map(line, range(100, 300))])
    assert made(without_field, part="validation")[0].skipped == {"no field 'text'": 1}


def test_held_out_documents_are_in_one_part_only(lines):
    wanted = lines(list(map(line, range(500))))
    cutter = tokenizer.load(wanted.tokenizer_at)
    train, held_out = (list(documents(made(wanted, part=part), cutter)) for part in ("train", "validation"))
    assert len(train) + len(held_out) == 500
    assert not set(train) & set(held_out)
    assert held_out
