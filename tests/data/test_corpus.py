"""From settings to batches."""

import json
import shutil

import pytest
import torch
from conftest import REPOSITORY
from corpora import sentences

from adafrugal.data.corpus import Corpus
from adafrugal.data.text import embedded
from adafrugal.data.text.tokenizer import train as train_tokenizer
from adafrugal.system.errors import SettingError


@pytest.fixture
def corpus(settings, c4_layout):
    """A function that opens the corpus of a tiny run on `c4_layout`: overrides -> Corpus; all are closed at the end."""
    opened = []

    def make(*overrides, data="c4", state=None, said=None):
        own = ["data.tokenizer.kind=train", "data.tokenizer.name=null", "data.processes=1", "eval.tokens=500"]
        if data != "embedded":
            own += [f"data.source={c4_layout}"]
        chosen, _ = settings("trainer.steps=4", f"data={data}", *own, *overrides)
        opened.append(Corpus(chosen, (said if said is not None else []).append, state))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


def test_a_row_is_one_document_padded_or_packed_as_set(corpus):
    batch = corpus().batches(1)
    assert batch.tokens.shape == (8, 64)
    assert (batch.tokens == 0).any() and batch.real_tokens() < 8 * 64
    packed = corpus("data.rows=packed").batches(1)
    assert packed.real_tokens() == 8 * 64 and packed.positions is None
    masked = corpus("data.rows=packed", "data.mask_documents=true").batches(1)
    assert torch.equal(masked.tokens, packed.tokens) and (masked.positions == 0).sum() > 8


def test_it_pins_batches_where_it_is_asked_to(settings, c4_layout, monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    own = ["data.tokenizer.kind=train", "data.tokenizer.name=null", "data.processes=1", "eval.tokens=500"]
    chosen, _ = settings("trainer.steps=1", "data=c4", f"data.source={c4_layout}", *own)
    for pin, tensors in ((False, 0), (True, 3)):
        found = Corpus(chosen, str, pin=pin)
        found.batches(1)
        found.close()
        assert len(pinned) == tensors


def test_the_second_time_nothing_is_prepared(corpus):
    said = [[], []]
    first, second = (corpus(said=lines).batches(1).tokens for lines in said)
    assert torch.equal(first, second)
    assert [line.split()[0] for line in said[0]] == ["training", "preparing"]
    assert said[1] == []


def test_what_it_says_about_itself_is_so(corpus):
    found = corpus()
    found.batches(4)
    about = found.about
    assert about["fingerprint"] == found.tokens.fingerprint and len(about["fingerprint"]) == 64
    assert about["train"]["documents"] == 600 and about["train"]["complete"]
    assert about["validation"]["documents"] == 100
    assert about["tokenizer"]["size"] == 512
    assert about["source"]["files"] == {"train": 10, "validation": 1}
    texts = sentences(700)
    assert about["train"]["bytes"] == sum(len(t.encode()) for t in texts[:600])
    json.dumps(about)


def test_evaluation_reads_about_the_tokens_that_were_asked_for_the_same_for_all(corpus):
    for rows in ("document", "packed"):
        found = corpus(f"data.rows={rows}")
        real = sum(batch.real_tokens() for batch in found.validation.batches)
        assert 350 < real < 650
        other = corpus(f"data.rows={rows}", "seed=5", "optimizer=adamw", "trainer.steps=2")
        assert torch.equal(found.validation.batches[0].tokens, other.validation.batches[0].tokens)
    everything = corpus("eval.tokens=1000000", "data.rows=document")
    batches = everything.validation.batches
    assert [len(batch.tokens) for batch in batches] == [8] * 13, "the last is filled up"
    assert sum(int((batch.real > 0).sum()) for batch in batches) == 100


def test_a_stream_leaves_no_training_tokens_and_gives_the_same_batches(corpus, cache_root):
    stored = corpus("seed=3")
    place = stored.tokens.plan.directory
    expected = [stored.batches(step).tokens for step in range(1, 5)]
    shutil.rmtree(place / "train")
    streamed = corpus("seed=3", "data.store=false")
    assert all(torch.equal(streamed.batches(step).tokens, expected[step - 1]) for step in range(1, 5))
    assert not (place / "train").exists()
    assert streamed.unigram_loss == stored.unigram_loss


def test_its_state_is_plain_and_another_goes_on_from_it(corpus):
    for store in ("true", "false"):
        uninterrupted = corpus(f"data.store={store}")
        read = [uninterrupted.batches(step).tokens for step in range(1, 5)]
        interrupted = corpus(f"data.store={store}")
        interrupted.batches(1)
        interrupted.batches(2)
        state = json.loads(json.dumps(interrupted.state_dict()))
        resumed = corpus(f"data.store={store}", state=state)
        assert resumed.unigram_loss == uninterrupted.unigram_loss
        assert all(torch.equal(resumed.batches(step).tokens, read[step - 1]) for step in (3, 4))


def test_other_data_are_refused_before_they_are_prepared(corpus, c4_layout):
    state = corpus().state_dict()
    (c4_layout / "en" / "c4-train.00009-of-00010.json.gz").unlink()
    said = []
    with pytest.raises(SettingError, match=r"the run was begun on other data \(fingerprint .*, now .*\)"):
        corpus(state=state, said=said)
    assert not any("preparing" in line for line in said)


def test_files_of_ones_own(corpus, tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "a.txt").write_text("\n\n".join(sentences(400)))
    found = corpus(f"data.source='{tmp_path}/own/*.txt'", data="text")
    found.batches(1)
    about = found.about
    assert about["train"]["documents"] + about["validation"]["documents"] == 400
    assert about["source"]["validation"] == "5.00% of the documents, by hash"


def test_a_sentencepiece_model_of_ones_own(corpus, tmp_path):
    made = train_tokenizer(sentences(200), 310, "unigram")
    made.save(tmp_path)
    own = ["data.tokenizer.kind=sentencepiece", f"data.tokenizer.name={tmp_path}/tokenizer.model"]
    found = corpus(*own)
    assert found.tokens.tokenizer.fingerprint == made.fingerprint
    assert found.batches(1).tokens.max() < 310
    with pytest.raises(SettingError, match=r"data.tokenizer.name is .*none.model: No such file.*; allowed: .*.model"):
        corpus(own[0], f"data.tokenizer.name={tmp_path}/none.model")


def test_a_trained_tokenizer_is_named_by_its_settings_and_the_corpus(corpus, c4_layout, tmp_path):
    names = [corpus("data.tokenizer.vocabulary_size=400").tokens.plan.tokenizer_at.name]
    names.append(corpus("data.tokenizer.vocabulary_size=400", "data.tokenizer.byte_fallback=false")
                 .tokens.plan.tokenizer_at.name)  # fmt: skip
    (c4_layout / "en" / "c4-train.00009-of-00010.json.gz").unlink()
    names.append(corpus("data.tokenizer.vocabulary_size=400").tokens.plan.tokenizer_at.name)
    assert len(set(names)) == 3
    assert all(name.startswith("bpe-400-") for name in names)


def test_ids_beyond_the_models_vocabulary_are_refused_before_anything_is_cut(corpus, tmp_path):
    train_tokenizer(sentences(200), 600, "bpe").save(tmp_path)
    said = []
    with pytest.raises(SettingError, match=r"model.vocabulary_size is 512, and the tokenizer can emit ids up to 599"):
        corpus("data.tokenizer.kind=sentencepiece", f"data.tokenizer.name={tmp_path}/tokenizer.model", said=said)
    assert said == []


def test_a_corpus_smaller_than_one_batch_is_one_line(corpus, tmp_path):
    (tmp_path / "few.txt").write_text("\n\n".join(sentences(20)))
    few = ["data.tokenizer.vocabulary_size=320", f"data.source={tmp_path}/few.txt", "data.held_out=0.3"]
    with pytest.raises(SettingError, match=r"that takes 2,048 rows and there are \d+, .*; allowed: up to \d+ steps"):
        corpus(*few, "trainer.batch_size=512", data="text").batches(1)


def test_an_empty_file_is_one_line(corpus, tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(SettingError, match=r"data.source is .*empty.txt, which has no text that could be read: "):
        corpus(f"data.source={tmp_path}/empty.txt", data="text")


def test_the_fingerprint_is_the_one_that_the_committed_records_have(corpus, cache_root):
    versions = embedded.versions()
    if versions != {"torch": "2.13.0", "numpy": "2.4.6"}:
        pytest.skip("other versions than requirements.txt pins")
    records = REPOSITORY / "experiments" / "results" / "embedded"
    found = json.loads(next(records.rglob("environment.json")).read_text())["data"]["fingerprint"]
    opened = corpus("model=llama_3m", data="embedded")
    assert opened.tokens.fingerprint == found
