"""Small corpora on the disk, and what is made of them."""

import gzip
import json
import random

import pytest

from adafrugal.data.rows import Layout
from adafrugal.data.text import sources, tokenizer
from adafrugal.data.tokens.preparation import Plan
from adafrugal.settings.schema import CorpusSettings

WORDS = ["the", "a", "of", "every", "matrix", "gradient", "moment", "keeps", "loses", "follows", "café", "Việt", "ρ"]


def sentences(count, seed=0):
    """Documents of 3 to 60 words, each with its number, so that no two are alike."""
    chosen = random.Random(seed)
    return [f"{i} {' '.join(chosen.choices(WORDS, k=chosen.randint(3, 60)))}." for i in range(count)]


@pytest.fixture
def c4_layout(tmp_path):
    """A directory in C4's layout: 10 training files of 60 documents, one validation file of 100."""
    root = tmp_path / "c4"
    (root / "en").mkdir(parents=True)
    splits = "".join(
        f"  - split: {split}\n    path: en/c4-{split}.*.json.gz\n" for split in ("train", "validation")
    )  # fmt: skip
    (root / "README.md").write_text(f"---\nconfigs:\n- config_name: en\n  data_files:\n{splits}---\n")
    texts = sentences(700)
    for number in range(10):
        _write(root / "en" / f"c4-train.{number:05}-of-00010.json.gz", texts[60 * number : 60 * number + 60])
    _write(root / "en" / "c4-validation.00000-of-00001.json.gz", texts[600:])
    return root


def texts_of(file):
    """The documents that stand in a file of `c4_layout`."""
    with gzip.open(file, "rt", encoding="utf-8") as opened:
        return [json.loads(line)["text"] for line in opened]


def _write(file, texts):
    with gzip.open(file, "wt", encoding="utf-8") as opened:
        opened.writelines(json.dumps({"text": t, "timestamp": "now", "url": "local://"}) + "\n" for t in texts)


@pytest.fixture
def corpus_settings(c4_layout):
    """A function that gives the settings of a corpus, by default of `c4_layout`."""

    def make(**more):
        return CorpusSettings(**{"source": str(c4_layout), "subset": "en", **more})

    return make


@pytest.fixture
def tokenizer_at(tmp_path):
    """The directory of a SentencePiece tokenizer of 320 pieces."""
    place = tmp_path / "tokenizer"
    place.mkdir()
    tokenizer.train(sentences(300), 320, "bpe").save(place)
    return place


@pytest.fixture
def plan(corpus_settings, tokenizer_at, tmp_path):
    """A function that gives the plan to prepare everything of a small corpus, in shards of about 10,000 tokens."""

    def make(data=None, **more):
        source = sources.resolve(data or corpus_settings(), tmp_path / "cache", str)
        values = {
            "directory": tmp_path / "store", "source": source, "tokenizer_at": tokenizer_at,
            "layout": Layout(16, True, False, end=1, pad=0), "shard_tokens": 10_000, "window": 2, "rows": None,
            "validation_tokens": 1000, "limit": None, "processes": 1, "streamed": False,
        }  # fmt: skip
        return Plan(**(values | more))

    return make
