"""Small corpora on the disk, and plans to prepare them."""

import functools
import gzip
import json
import random
from pathlib import Path

import pytest

from adafrugal.data.rows import Layout
from adafrugal.data.text import sources, tokenizer
from adafrugal.data.tokens import encoding, preparation
from adafrugal.data.tokens.preparation import Plan
from adafrugal.settings.schema import CorpusSettings

WORDS = ["the", "a", "of", "every", "matrix", "gradient", "moment", "keeps", "loses", "follows", "café", "Việt", "ρ"]
SPLITS = "".join(f"  - split: {s}\n    path: en/c4-{s}.*.json.gz\n" for s in ("train", "validation"))
CARD = f"---\nconfigs:\n- config_name: en\n  data_files:\n{SPLITS}---\n"


def sentences(count, seed=0):
    """Documents of 3 to 60 words, each with its number, so that no two are alike."""
    chosen = random.Random(seed)
    return [f"{i} {' '.join(chosen.choices(WORDS, k=chosen.randint(3, 60)))}." for i in range(count)]


def zipped(texts):
    """Documents as a file of C4 holds them; the same bytes every time."""
    rows = ({"text": text, "timestamp": "now", "url": "local://"} for text in texts)
    return gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), mtime=0)


def texts_of(file):
    """The documents in a file of `c4_layout`."""
    return [json.loads(line)["text"] for line in gzip.decompress(Path(file).read_bytes()).splitlines()]


@pytest.fixture
def c4_layout(tmp_path):
    """A directory in C4's layout: 10 training files of 60 documents, one validation file of 100."""
    root, texts = tmp_path / "c4", sentences(700)
    (root / "en").mkdir(parents=True)
    (root / "README.md").write_text(CARD)
    for number in range(10):
        file = root / "en" / f"c4-train.{number:05}-of-00010.json.gz"
        file.write_bytes(zipped(texts[60 * number : 60 * number + 60]))
    (root / "en" / "c4-validation.00000-of-00001.json.gz").write_bytes(zipped(texts[600:]))
    return root


@pytest.fixture
def corpus_settings(c4_layout):
    """A function that gives the settings of a corpus, by default of `c4_layout`."""
    return lambda **more: CorpusSettings(**{"source": str(c4_layout), "subset": "en", **more})


@functools.cache
def small_tokenizer():
    """A SentencePiece tokenizer of 320 pieces."""
    return tokenizer.train(sentences(300), 320, "bpe")


@pytest.fixture
def plan(corpus_settings, tmp_path):
    """A function that gives the plan to prepare all of a small corpus, in shards of about 10,000 tokens."""

    def make(data=None, **more):
        values = {
            "directory": tmp_path / "store", "tokenizer": small_tokenizer(), "fingerprint": "f" * 64,
            "source": sources.resolve(data or corpus_settings(), tmp_path / "cache", str),
            "layout": Layout(16, True, False, end=1, pad=0), "shard_tokens": 10_000, "window": 2, "rows": None,
            "validation_tokens": 1000, "limit": None, "processes": 1,
        }  # fmt: skip
        return Plan(**(values | more))

    return make


def prepare(plan):
    """Prepare a plan's store in this process."""
    with encoding.Encoder(plan.tokenizer, 1) as encoder:
        preparation.fill(plan, encoder)
    return plan
