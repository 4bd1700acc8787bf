"""On real data: local mirrors of C4, VietVault and the T5 tokenizer, where there are any."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from adafrugal.data.text import tokenizer
from adafrugal.tracking.record import Record

MIRRORS = Path(os.environ.get("ADAFRUGAL_MIRRORS", "/nowhere"))
pytestmark = pytest.mark.skipif(not (MIRRORS / "c4").is_dir(), reason="ADAFRUGAL_MIRRORS names no local mirror")
C4 = ["data=c4", f"data.source={MIRRORS}/c4", f"data.tokenizer.name={MIRRORS}/t5-base"]


@pytest.fixture(scope="module")
def texts():
    with gzip.open(next((MIRRORS / "c4" / "en").glob("*validation*")), "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file][:300]


@pytest.fixture(scope="module")
def t5():
    return tokenizer.PretrainedTokenizer.of_transformers(str(MIRRORS / "t5-base"))


def test_t5_cuts_ordinary_text_as_transformers_does(texts, t5):
    theirs = AutoTokenizer.from_pretrained(MIRRORS / "t5-base")
    plain = [text for text in texts if "<" not in text]
    assert len(plain) > 200
    for ours, ids in zip(t5.encode(plain), theirs(plain, verbose=False)["input_ids"], strict=True):
        assert ours.tolist() == ids


def test_t5_fits_a_vocabulary_of_32000_whatever_the_text(texts, t5):
    assert t5.size == 32_000
    (ids,) = t5.encode(["<extra_id_0> <extra_id_99> </s> <pad> <unk>"])
    assert ids.max() < 32_000 and (ids == t5.end).sum() == 1 and ids[-1] == t5.end


def test_the_bytes_of_t5s_tokens_add_up_to_the_text(texts, t5):
    for text, (_, counts) in zip(texts, t5.encode_with_bytes(texts), strict=True):
        assert counts.sum() == len(text.encode())


def test_every_document_of_c4_is_used(cache_root, tmp_path):
    words = [sys.executable, "-m", "adafrugal.data", "--all", *C4, f"cache_root={cache_root}", "eval.tokens=1000"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = 0
    for file in (MIRRORS / "c4" / "en").glob("*train*"):
        with gzip.open(file) as opened:
            lines += sum(1 for _ in opened)
    (counts,) = [line.split() for line in done.stdout.splitlines() if line.startswith("documents")]
    assert int(counts[1].replace(",", "")) == lines == 32_273


@pytest.mark.parametrize("store", ["true", "false"])
def test_a_run_on_c4_reads_its_documents(train, store):
    own = ["model=llama_9m", "trainer.steps=3", "eval.tokens=2000", f"data.store={store}", "data.window_tokens=500000"]
    done = train(*C4, *own, scale=None)
    assert done.returncode == 0, done.stderr
    record = Record(next(train.root.glob("*/*/status.json")).parent)
    summary = record.summary()
    assert 0 < summary["padding"] < 0.5
    assert summary["real_tokens"] < summary["tokens"] == 3 * 8 * 128
    assert summary["seconds"]["data"] < summary["seconds"]["forward"]
    assert record.environment()["data"]["tokenizer"]["size"] == 32_000


def test_a_run_on_vietvault_trains_a_tokenizer_that_keeps_diacritics(train, cache_root):
    own = ["data=vietvault", f"data.source={MIRRORS}/vietvault", "model=llama_9m", "trainer.steps=2"]
    done = train(*own, "eval.tokens=2000", scale=None)
    assert done.returncode == 0, done.stderr
    record = Record(next(train.root.glob("*/*/status.json")).parent)
    assert record.summary()["padding"] == 0
    (place,) = (cache_root / "tokenizers").glob("bpe-32000-*")
    cutter = tokenizer.load(place)
    for text in ("Tiếng Việt có dấu: ngã, hỏi, nặng, huyền, sắc.", "Đường Nguyễn Huệ"):
        (ids,) = cutter.encode([text])
        assert cutter.decode(ids[:-1]) == text
        assert len(ids) < len(text) / 2
