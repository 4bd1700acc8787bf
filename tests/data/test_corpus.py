"""From settings to batches."""

import json
from contextlib import closing

import pytest
import torch
from conftest import REPOSITORY
from corpora import prepare, sentences

from adafrugal.data.corpus import Corpus, locate
from adafrugal.data.text import embedded
from adafrugal.data.text.tokenizer import train as train_tokenizer
from adafrugal.system.errors import SettingError

OWN = ["data.tokenizer.kind=train", "data.tokenizer.name=null", "data.processes=1", "eval.tokens=500"]


@pytest.fixture
def chosen(settings, c4_layout):
    """A function that gives the settings of a tiny run on `c4_layout`: overrides -> Settings."""

    def make(*overrides, data="c4"):
        source = [] if data == "embedded" else [f"data.source={c4_layout}"]
        return settings("trainer.steps=4", f"data={data}", *OWN, *source, *overrides)[0]

    return make


@pytest.fixture
def plan(chosen):
    """A function that plans the tokens of a tiny run: overrides -> Plan."""
    return lambda *overrides, data="c4", say=str: locate(chosen(*overrides, data=data), say)


@pytest.fixture
def corpus(chosen, request):
    """A function that opens the corpus of a tiny run, all of it prepared in this process: overrides -> Corpus."""

    def make(*overrides, data="c4"):
        own = chosen(*overrides, data=data)
        prepare(locate(own, str))
        request.addfinalizer((found := Corpus(own, str)).close)
        return found

    return make


def test_a_row_is_one_document_padded_or_packed_as_set(corpus):
    batch = corpus().batches(1)
    assert batch.tokens.shape == (8, 64)
    assert (batch.tokens == 0).any() and batch.real_tokens() < 8 * 64
    packed = corpus("data.rows=packed").batches(1)
    assert packed.real_tokens() == 8 * 64 and packed.positions is None
    masked = corpus("data.rows=packed", "data.mask_documents=true").batches(1)
    assert torch.equal(masked.tokens, packed.tokens) and (masked.positions == 0).sum() > 8


def test_the_second_time_nothing_is_prepared_and_a_run_goes_on_from_a_plain_state_unless_the_text_has_changed(
    chosen, c4_layout
):
    own = chosen("seed=3", "data.tokenizer.vocabulary_size=350")
    said = [[], []]
    with closing(Corpus(own, said[0].append)) as first:
        read = [first.batches(step).tokens for step in range(1, 5)]
        state = json.loads(json.dumps(first.state_dict()))
    with closing(Corpus(own, said[1].append, state)) as second:
        assert [line.split()[0] for line in said[0]] == ["training", "preparing"] and said[1] == []
        assert second.unigram_loss == first.unigram_loss
        assert all(torch.equal(second.batches(step).tokens, read[step - 1]) for step in (3, 4, 1))
    (c4_layout / "en" / "c4-train.00009-of-00010.json.gz").unlink()
    with pytest.raises(SettingError, match=r"the run was begun on other data \(fingerprint .*, now .*\)"):
        Corpus(own, said[1].append, state)
    assert not any("preparing" in line for line in said[1])


def test_the_directory_of_tokens_tells_the_text_and_one_that_an_older_version_named_is_used(chosen, plan, tmp_path):
    texts = tmp_path / "poems" / "old"
    texts.mkdir(parents=True)
    for name in ("b.txt", "a.v2.txt"):
        (texts / name).write_text("\n\n".join(sentences(99)))
    words = ["data.tokenizer.vocabulary_size=300", "data.rows=packed"]
    for source, named in (
        (texts / "*.txt", "old"), (f"{tmp_path}/poems/*/b.txt", "poems"), (texts, "old"), (texts / "a.v2.txt", "a"),
    ):  # fmt: skip
        assert plan(*words, f"data.source={source}", data="text").directory.name.startswith(f"{named}-")
    assert plan("data.tokenizer.vocabulary_size=350").directory.name.startswith("c4-")
    assert plan("data.tokenizer.vocabulary_size=350", data="embedded").directory.name.startswith("embedded-train-")
    found = plan(*words, f"data.source={texts}/*.txt", data="text").directory
    older = found.with_name(f"b-{found.name.rpartition('-')[2]}")
    older.mkdir(parents=True)
    assert plan(*words, f"data.source={texts}/*.txt", data="text").directory == older
    older.rmdir()


def test_data_seed_alone_decides_the_order_and_is_the_runs_seed_unless_it_is_set(corpus):
    one, other, of_run, both = (
        corpus(*words.split()).batches(1).tokens for words in ("", "data.seed=1", "seed=1", "seed=1 data.seed=0")
    )
    assert torch.equal(other, of_run) and torch.equal(both, one) and not torch.equal(one, other)


def test_it_describes_itself(corpus):
    found = corpus()
    about = json.loads(json.dumps(found.about))
    assert about["fingerprint"] == found.plan.fingerprint and len(about["fingerprint"]) == 64
    assert about["train"]["documents"] == 600 and about["train"]["complete"]
    assert about["validation"]["documents"] == 100
    assert about["tokenizer"]["size"] == 512
    assert about["source"]["files"] == {"train": 10, "validation": 1}
    assert about["train"]["bytes"] == sum(len(t.encode()) for t in sentences(700)[:600])


def test_evaluation_reads_about_the_tokens_that_were_asked_for_the_same_for_all(corpus):
    for rows in ("document", "packed"):
        found = corpus(f"data.rows={rows}", "eval.last_tokens=1000000")
        real = sum(batch.real_tokens() for batch in found.validation.batches)
        assert 350 < real < 650
        other = corpus(f"data.rows={rows}", "seed=5", "optimizer=adamw", "trainer.steps=2")
        assert torch.equal(found.validation.batches[0].tokens, other.validation.batches[0].tokens)
    batches = corpus("eval.last_tokens=1000000").last_validation.batches
    assert [len(batch.tokens) for batch in batches] == [8] * 13, "the last is filled up"
    assert sum(int((batch.real > 0).sum()) for batch in batches) == 100


def test_own_files(corpus, tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "a.txt").write_text("\n\n".join(sentences(400)))
    about = corpus(f"data.source='{tmp_path}/own/*.txt'", data="text").about
    assert about["train"]["documents"] + about["validation"]["documents"] == 400
    assert about["source"]["validation"] == "5.00% of the documents, by hash"


def test_an_own_sentencepiece_model(plan, tmp_path):
    made = train_tokenizer(sentences(200), 310, "unigram")
    made.save(tmp_path)
    own = ["data.tokenizer.kind=sentencepiece", f"data.tokenizer.name={tmp_path}/tokenizer.model"]
    assert plan(*own).tokenizer.fingerprint == made.fingerprint
    with pytest.raises(SettingError, match=r"data.tokenizer.name is .*none.model: No such file.*; allowed: .*.model"):
        plan(own[0], f"data.tokenizer.name={tmp_path}/none.model")
    with pytest.raises(SettingError, match=r"model.vocabulary_size is 309, and the tokenizer can emit ids up to 309"):
        plan(*own, "model.vocabulary_size=309")


def test_a_trained_tokenizer_is_named_by_its_settings_and_the_corpus(plan, c4_layout):
    size, said = "data.tokenizer.vocabulary_size=400", []
    plan(size, say=said.append)
    plan(size, "data.tokenizer.byte_fallback=false", say=said.append)
    (c4_layout / "en" / "c4-train.00009-of-00010.json.gz").unlink()
    plan(size, say=said.append)
    names = {line.rpartition("/")[2] for line in said}
    assert len(names) == 3 and all(name.startswith("bpe-400-") for name in names)


def test_a_text_without_enough_documents_is_one_line(corpus, tmp_path):
    (tmp_path / "few.txt").write_text("\n\n".join(sentences(20)))
    few = ["data.tokenizer.vocabulary_size=320", f"data.source={tmp_path}/few.txt", "data.held_out=0.3"]
    with pytest.raises(SettingError, match=r"that takes 2,048 rows and there are \d+, .*; allowed: up to \d+ steps"):
        corpus(*few, "trainer.batch_size=512", data="text").batches(1)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(SettingError, match=r"data.source is .*empty.txt, which has no text that could be read: "):
        corpus(f"data.source={tmp_path}/empty.txt", data="text")


def test_the_fingerprint_is_that_of_the_committed_records(plan):
    if embedded.versions() != {"torch": "2.13.0", "numpy": "2.4.6"}:
        pytest.skip("other versions than requirements.txt pins")
    records = REPOSITORY / "experiments" / "results" / "embedded"
    found = json.loads(next(records.rglob("environment.json")).read_text())["data"]["fingerprint"]
    assert plan("model=llama_3m", data="embedded").fingerprint == found
