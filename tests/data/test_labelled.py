"""Labelled examples: their order, their padding, and wrong ones."""

import numpy as np
import pytest
import torch
from labelled_sets import TRAIN, VALIDATION, rows, write_glue, write_parquet
from transformers import AutoTokenizer

from adafrugal.data.labelled import ALIKE, Labelled, TrainingOrder
from adafrugal.settings.schema import LabelledSettings
from adafrugal.system.errors import SettingError

LENGTHS = np.random.default_rng(0).integers(3, 60, size=1000)


@pytest.fixture(scope="module")
def tokenizer(tiny_encoder):
    return AutoTokenizer.from_pretrained(tiny_encoder)


@pytest.fixture
def read(glue, tokenizer, tmp_path):
    """A function: settings -> the splits, of RTE by default."""

    def make(length=48, **given):
        defaults = {"source": str(glue), "subset": "rte", "fields": ["sentence1", "sentence2"]}
        return Labelled(LabelledSettings(**{**defaults, **given}), tokenizer, length, tmp_path / "cache")

    return make


@pytest.fixture
def refused(read):
    """A function: settings -> the line that refuses them."""

    def make(**given):
        with pytest.raises(SettingError) as caught:
            read(**given)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return make


# -- the order --------------------------------------------------------------------------------------------------------


def test_every_epoch_has_every_example_once_in_an_order_of_its_own_by_seed_and_step():
    order, again = TrainingOrder(LENGTHS, 32, seed=0), TrainingOrder(LENGTHS, 32, seed=0)
    assert order.steps == 32  # 31 of 32 examples, and one of 8
    for epoch in (5, 0, 1):
        steps = [order[epoch * 32 + number] for number in range(1, 33)]
        assert sorted(np.concatenate(steps)) == list(range(1000))
        assert sorted(len(step) for step in steps) == [8] + [32] * 31
        assert np.array_equal(steps[2], again[epoch * 32 + 3])
    assert not np.array_equal(order[1], order[33])
    assert not np.array_equal(order[1], TrainingOrder(LENGTHS, 32, seed=1)[1])


def test_batches_hold_examples_of_about_one_length_and_come_in_no_order():
    order = TrainingOrder(LENGTHS, 8, seed=0)
    lengths = [LENGTHS[order[step]] for step in range(1, order.steps + 1)]
    longest = np.array([some.max() for some in lengths])
    padded = sum(len(some) * some.max() for some in lengths)
    at_random = sum(LENGTHS[i : i + 8].max() * 8 for i in range(0, 1000, 8))
    assert padded < 1.06 * LENGTHS.sum() < 1.5 * LENGTHS.sum() < at_random
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.3
    assert order.steps > 2 * ALIKE


# -- examples ---------------------------------------------------------------------------------------------------------


def test_pairs_are_cut_as_the_models_tokenizer_cuts_them(read, tokenizer):
    found, row = read(), rows("rte", TRAIN, 0)[3]
    expected = tokenizer(row["sentence1"], row["sentence2"])
    assert found.train.tokens[3].tolist() == expected["input_ids"]
    assert found.train.types[3].tolist() == expected["token_type_ids"]
    assert set(expected["token_type_ids"]) == {0, 1}
    assert found.about()["examples"] == {"train": TRAIN, "validation": VALIDATION}
    short = read(length=12)
    assert max(map(len, short.train.tokens)) == 12
    expected = tokenizer(row["sentence1"], row["sentence2"], truncation="longest_first", max_length=12)
    assert short.train.tokens[3].tolist() == expected["input_ids"], "the longer sentence loses its end"


def test_a_set_has_classes_or_scores_one_sentence_or_two_and_one_validation_split_or_more(read):
    one = read(subset="sst2", fields=["sentence"])
    assert len(one.train) == TRAIN and one.train.labels.dtype == np.int64 and not any(map(np.any, one.train.types))
    assert read(subset="stsb", classes=None).train.labels.dtype == np.float32
    names = ["validation_matched", "validation_mismatched"]
    pairs = read(subset="mnli", fields=["premise", "hypothesis"], classes=3, validation_splits=names)
    assert list(pairs.validation) == names and all(map(np.any, pairs.train.types))


def test_a_batch_is_padded_to_its_own_longest(read, tokenizer):
    found = read()
    batch = found.train.batch([4, 0, 9])
    lengths = [len(found.train.tokens[i]) for i in (4, 0, 9)]
    assert batch.tokens.shape == (3, max(lengths))
    assert batch.mask.sum(1).tolist() == lengths
    assert (batch.tokens[batch.mask == 0] == tokenizer.pad_token_id).all()
    assert batch.real_tokens() == sum(lengths) and batch.count() == 3
    assert batch.labels.tolist() == [0, 0, 1]
    batches = list(found.validation["validation"].by_length(4))
    lengths = torch.cat([b.mask.sum(1) for b in batches]).tolist()
    expected = sorted(map(len, found.validation["validation"].tokens), reverse=True)
    assert lengths == expected, "every example once, the longest first"
    assert [b.tokens.shape[1] for b in batches] == lengths[::4]


def test_a_part_is_the_same_whatever_the_seed_and_a_larger_one_holds_it(read):
    found = [read(examples=n) for n in (5, 5, 12)]
    texts = [{tuple(t.tolist()) for t in one.train.tokens} for one in found]
    assert texts[0] == texts[1] < texts[2] and found[0].fingerprint != found[2].fingerprint


def test_the_fingerprint_is_of_texts_and_labels(read, tmp_path):
    mirror = write_glue(tmp_path / "glue", ["rte"])
    before = read(source=str(mirror)).fingerprint
    assert before == read().fingerprint  # another directory, the same rows
    changed = rows("rte", VALIDATION, 1)
    changed[-1]["label"] = 1 - changed[-1]["label"]
    write_parquet(mirror / "rte" / "validation-00000-of-00001.parquet", changed)
    assert read(source=str(mirror)).fingerprint != before


# -- wrong examples ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"examples": 27}, f"data.examples is 27; allowed: up to the {TRAIN} of train"),
        ({"subset": "qnl"}, "data.subset is qnl: BuilderConfig 'qnl' not found. Available: ['cola'"),
        ({"subset": None}, "data.subset is null: Config name is missing"),
        ({"split": "trian"}, "there is no data.split trian; allowed: train, validation"),
        ({"validation_splits": ["test"]}, "there is no data.validation_splits test; allowed: train, validation"),
        ({"fields": ["sentence"]}, "there is no column sentence (data.fields); allowed: sentence1, sentence2, label"),
        ({"fields": ["idx"]}, "the column idx holds int; data.fields are texts"),
        ({"label_field": "y"}, "there is no column y (data.label_field); allowed:"),
        ({"subset": "mnli", "fields": ["premise"], "validation_splits": ["validation_matched"]}, "row 2 of train has"),
        ({"source": "/nowhere/at/all"}, "data.source is /nowhere/at/all, and there is no such directory"),
    ],
)
def test_a_missing_split_or_column_is_one_line(given, line, refused):
    assert line in refused(**given)


ALLOWED = "; allowed: 0 to 1 (data.classes), as whole numbers"


@pytest.mark.parametrize(
    ("label", "classes", "line"),
    [
        (2, 2, f"row 4 of validation has the label 2{ALLOWED}"),
        (-1, 2, f"row 4 of validation has the label -1{ALLOWED}; a split without"),
        (None, 2, f"row 4 of validation has the label None{ALLOWED}; a split without"),
        (0.5, 2, f"row 4 of validation has the label 0.5{ALLOWED}"),
        (float("nan"), None, "row 4 of validation has the label nan; allowed: a number"),
        ("yes", 2, f"row 0 of train has the label 0{ALLOWED}"),  # a column of text
    ],
)
def test_a_label_outside_its_range_is_refused_with_its_row(label, classes, line, refused, tmp_path):
    mirror, kind = write_glue(tmp_path / "glue", ["rte"]), int if label is None else type(label)
    for seed, split in enumerate(("train", "validation")):
        found = [{**row, "label": kind(row["label"])} for row in rows("rte", 9, seed)]
        if split == "validation":
            found[4]["label"] = label
        write_parquet(mirror / "rte" / f"{split}-00000-of-00001.parquet", found)
    assert line in refused(source=str(mirror), classes=classes)


def test_a_damaged_file_is_one_line(refused, tmp_path):
    mirror = write_glue(tmp_path / "glue", ["rte"])
    file = mirror / "rte" / "validation-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:-30])
    line = refused(source=str(mirror))
    assert "glue, data.subset is rte: " in line and "parquet" in line.lower()
