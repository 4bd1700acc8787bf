import json

import numpy as np
import pytest
from corpora import texts_of

from adafrugal.data.text import tokenizer
from adafrugal.data.text.sources import Position
from adafrugal.data.tokens.encoding import Encoder
from adafrugal.system.errors import SettingError


def made(plan, begin=Position(), tokens=10_000, processes=1, split="train", **more):  # noqa: B008 - a frozen value
    with Encoder(plan.tokenizer, processes) as encoder:
        return list(encoder.shards(plan.source, getattr(plan.source, split), begin, tokens, **more))


def documents(found, cutter):
    for shard in found:
        for begin, end in zip(np.concatenate([[0], shard.ends[:-1]]), shard.ends, strict=True):
            yield cutter.decode(shard.tokens[begin : end - 1])
            assert shard.tokens[end - 1] == cutter.end


def plain(shards):
    """The content of shards, to compare."""
    return [(s.tokens.tolist(), s.ends.tolist(), s.after, s.skipped, s.text_bytes) for s in shards]


def test_every_document_is_there_once_and_in_order_from_any_shard_on_for_any_number_of_processes(plan):
    wanted = plan()
    found = made(wanted)
    texts = [text for file in wanted.source.train.files for text in texts_of(file)]
    assert len(texts) == 600 and list(documents(found, wanted.tokenizer)) == texts
    assert sum(shard.text_bytes for shard in found) == sum(len(t.encode()) for t in texts)
    assert len(found) > 3 and all(len(shard.tokens) >= 10_000 for shard in found[:-1])
    assert found[0].token_bytes is None
    assert plain(made(wanted, processes=2)) == plain(found)
    for number in range(len(found)):
        assert plain(made(wanted, begin=found[number].after)) == plain(found[number + 1 :])
    (counted,) = made(wanted, split="validation", tokens=10**6, count_bytes=True)
    assert counted.token_bytes.sum() == counted.text_bytes


def test_an_id_beyond_the_vocabulary_is_refused(plan, monkeypatch):
    monkeypatch.setattr(tokenizer.SentencePieceTokenizer, "_ids", lambda self, texts: [[400] for _ in texts])
    with pytest.raises(SettingError, match="the id 400, beyond its vocabulary of 320"):
        made(plan())


@pytest.fixture
def lines(tmp_path, corpus_settings, plan):
    """A function that gives the plan of a .jsonl file of the given lines."""

    def make(written):
        file = tmp_path / "lines.jsonl"
        file.write_bytes(b"".join(line if isinstance(line, bytes) else f"{line}\n".encode() for line in written))
        return plan(corpus_settings(source=str(file), subset=None, held_out=0.05))

    return make


def line(i):
    return json.dumps({"text": f"sentence {i} of several words"})


def test_a_broken_document_is_skipped_and_counted_and_each_other_is_in_one_split(lines):
    broken = ['{"text": "bro', b'{"text": "\xff\xfe"}\n']
    wanted = lines([*map(line, range(300)), *broken, *map(line, range(300, 500))])
    found = [made(wanted, split=split) for split in ("train", "validation")]
    assert all(shard.skipped == {"not JSON": 1, "not UTF-8": 1} for (shard,) in found)
    train, held_out = (list(documents(shards, wanted.tokenizer)) for shards in found)
    assert len({*train, *held_out}) == len(train) + len(held_out) == 500 and 0 < len(held_out) < 100


LATIN = [*map(line, range(20)), *[b'{"text": "latin caf\xe9"}\n'] * 400]
REFUSED = [
    (LATIN, r"documents are broken \(\d+: not UTF-8\).*1%.*convert the files to UTF-8"),
    (['{"content": "x", "id": 1}'] * 300, r"data.text_field is text, which .*lines.* does not have; .*content, id"),
]


@pytest.mark.parametrize(("written", "message"), REFUSED, ids=["broken", "another field"])
def test_a_file_of_broken_documents_or_without_the_field_is_refused_in_one_line(lines, written, message):
    with pytest.raises(SettingError, match=message):
        made(lines(written))


def test_a_document_without_the_field_is_skipped(lines):
    once = lines([*map(line, range(100)), '{"content": "x"}', *map(line, range(100, 300))])
    assert made(once, split="validation")[0].skipped == {"no field 'text'": 1}


def test_broken_documents_are_weighed_against_all_and_not_against_those_held_out(lines):
    wanted = lines([*map(line, range(2500)), *['{"text": "bro'] * 15, *map(line, range(2500, 3000))])
    (found,) = made(wanted, split="validation", tokens=10**6)
    assert found.skipped == {"not JSON": 15} and len(found.ends) < 250
