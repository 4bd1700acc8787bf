"""On real data: local mirrors of C4, VietVault and the T5 tokenizer, where there are any."""

import gzip
import itertools
import json
import os
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from adafrugal.data import __main__
from adafrugal.data.text import tokenizer
from adafrugal.tracking.record import Record

MIRRORS = Path(os.environ.get("ADAFRUGAL_MIRRORS", "/nowhere"))
pytestmark = pytest.mark.skipif(not (MIRRORS / "c4").is_dir(), reason="ADAFRUGAL_MIRRORS names no local mirror")
SPLITS = ("train.00000-of-00004", "train.00003-of-00004", "validation.00000-of-00001")
FILES = [f"en/c4-{name}.json.gz" for name in SPLITS]


def lines(file, count):
    with gzip.open(file, "rt", encoding="utf-8") as opened:
        return list(itertools.islice(opened, count))


@pytest.fixture
def c4(tmp_path):
    """Settings of a corpus of the first 250 documents of three files of C4, laid out as there."""
    (tmp_path / "c4" / "en").mkdir(parents=True)
    (tmp_path / "c4" / "README.md").write_text((MIRRORS / "c4" / "README.md").read_text())
    for name in FILES:
        content = "".join(lines(MIRRORS / "c4" / name, 250)).encode()
        (tmp_path / "c4" / name).write_bytes(gzip.compress(content, mtime=0))
    return ["data=c4", f"data.source={tmp_path}/c4", f"data.tokenizer.name={MIRRORS}/t5-base", "data.processes=1"]


def test_t5_cuts_ordinary_text_as_transformers_does_within_its_32000_pieces_and_counts_all_bytes():
    texts = [json.loads(line)["text"] for line in lines(next((MIRRORS / "c4" / "en").glob("*validation*")), 300)]
    t5 = tokenizer.PretrainedTokenizer.of_transformers(str(MIRRORS / "t5-base"))
    theirs = AutoTokenizer.from_pretrained(MIRRORS / "t5-base")
    plain = [text for text in texts if "<" not in text]
    assert len(plain) > 200
    for ours, ids in zip(t5.encode(plain), theirs(plain, verbose=False)["input_ids"], strict=True):
        assert ours.tolist() == ids
    assert t5.size == 32_000
    (ids,) = t5.encode(["<extra_id_0> <extra_id_99> </s> <pad> <unk>"])
    assert ids.max() < 32_000 and (ids == t5.end).sum() == 1 and ids[-1] == t5.end
    for text, (_, counts) in zip(texts, t5.encode_with_bytes(texts), strict=True):
        assert counts.sum() == len(text.encode())


def test_every_document_of_c4_is_prepared_and_a_run_reads_them(train, c4, cache_root, capsys):
    own = [*c4, "model=llama_tiny", "model.vocabulary_size=32000", "eval.tokens=500"]
    assert __main__.main(["--all", *own, f"cache_root={cache_root}"]) == 0
    (counts,) = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("documents")]
    assert counts == ["documents", "500", "250"]
    done = train(*own, "trainer.steps=3", "eval.every=3", "trainer.sequence_length=256", "trainer.batch_size=4")
    assert done.returncode == 0, done.stderr
    record = Record(next(train.root.glob("*/*/status.json")).parent)
    summary = record.summary()
    assert 0 < summary["padding"] < 0.5
    assert summary["real_tokens"] < summary["tokens"] == 3 * 4 * 256
    assert summary["seconds"]["data"] < summary["seconds"]["forward"]
    assert record.environment()["data"]["tokenizer"]["size"] == 32_000


def test_a_run_on_vietvault_trains_a_tokenizer_that_keeps_diacritics(train, cache_root):
    own = ["data=vietvault", f"data.source={MIRRORS}/vietvault", "data.tokenizer.sample_bytes=200000"]
    own += ["model=llama_tiny", "data.tokenizer.vocabulary_size=2000", "model.vocabulary_size=2000"]
    done = train(*own, "trainer.steps=2", "eval.tokens=2000", "data.window_tokens=200000")
    assert done.returncode == 0, done.stderr
    record = Record(next(train.root.glob("*/*/status.json")).parent)
    assert record.summary()["padding"] == 0
    (directory,) = (cache_root / "tokenizers").glob("bpe-2000-*")
    cutter = tokenizer.load(directory)
    for text in ("Tiếng Việt có dấu: ngã, hỏi, nặng, huyền, sắc.", "Đường Nguyễn Huệ"):
        (ids,) = cutter.encode([text])
        assert cutter.decode(ids[:-1]) == text
        assert len(ids) < len(text) * 0.7
