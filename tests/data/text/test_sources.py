import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from corpora import sentences, texts_of

from adafrugal.data.text import embedded, sources
from adafrugal.data.text.documents import select
from adafrugal.data.text.sources import CHARACTERS, PIECES, Position
from adafrugal.settings.data_settings import EmbeddedSettings, TokenizerSettings
from adafrugal.system.errors import SettingError

ALL = {"subset": None, "held_out": 1e-9}  # of files: they have no subset, and nothing is held out


def read(source, split="train", begin=Position()):  # noqa: B008 - a frozen value
    return list(sources.read(source, getattr(source, split), begin))


def texts(source, split="train"):
    return [text for pieces, _ in read(source, split) for text in select(pieces, getattr(source, split).rules)[0]]


@pytest.fixture
def resolve(corpus_settings, tmp_path):
    """A function that resolves a corpus: settings -> Source."""
    return lambda **more: sources.resolve(corpus_settings(**more), tmp_path / "cache", str)


# -- which files ------------------------------------------------------------------------------------------------------


def test_a_directory_in_the_hubs_layout_has_its_splits_in_the_order_of_the_files(resolve):
    source = resolve()
    assert [Path(file).name[:14] for file in source.train.files] == [f"c4-train.{i:05}" for i in range(10)]
    assert texts(source) == [text for file in source.train.files for text in texts_of(file)]
    assert len(texts(source, "validation")) == 100
    held_out = resolve(split="validation", held_out=0.2)
    assert len(texts(held_out)) + len(texts(held_out, "validation")) == 100, "although there is a validation split"
    assert "20.00% of the documents, by hash" in held_out.described()["validation"]


@pytest.mark.parametrize(
    "more, message",
    [
        ({"split": "training"}, r"data.split is training, which .* does not have; allowed: train, validation"),
        ({"validation_split": "test"}, r"data.validation_split is test, which .*; allowed: train, validation"),
        ({"subset": "fr"}, r"data.subset is fr: .*'fr' not found. Available: \['en'\]"),
        ({"source": "corpus/typo.txt", "subset": None}, r"data.source is corpus/typo.txt, and there is no such file"),
        ({"source": "/nowhere/c4"}, r"data.source is /nowhere/c4, and there is no such file or directory; allowed:"),
        ({"source": "corpus/*.txt", "subset": None}, r"data.source is corpus/\*.txt, which no file matches; write it"),
        ({"source": "corpus/*.txt"}, r"data.subset is en, and data.source is corpus/\*.txt: files have none"),
    ],
)
def test_a_missing_source_is_one_line(resolve, more, message):
    with pytest.raises(SettingError, match=message) as caught:
        resolve(**more)
    assert "\n" not in str(caught.value)


# -- formats ----------------------------------------------------------------------------------------------------------

TEXTS = sentences(30)


@pytest.fixture
def files(tmp_path):
    """The same 30 documents in every format, and an empty file."""
    root = tmp_path / "files"
    root.mkdir()
    lines = "".join(json.dumps({"text": t, "n": 1}) + "\n" for t in TEXTS)
    (root / "a.jsonl").write_text(lines)
    (root / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pyarrow.parquet.write_table(pyarrow.table({"n": [1] * 30, "text": TEXTS}), root / "a.parquet", row_group_size=7)
    (root / "lines.txt").write_text("\n".join(TEXTS) + "\n")
    for number in range(3):
        (root / f"part{number}.text.txt").write_text("\n\n".join(TEXTS[10 * number : 10 * number + 10]) + "\n")
    (root / "empty.jsonl").touch()
    return root


@pytest.mark.parametrize(
    ("name", "sample_by", "expected"),
    [
        ("a.jsonl", "paragraph", TEXTS),
        ("a.jsonl.gz", "paragraph", TEXTS),
        ("a.parquet", "paragraph", TEXTS),
        ("lines.txt", "line", TEXTS),
        ("part*.txt", "paragraph", TEXTS),
        ("part*.txt", "document", ["\n\n".join(TEXTS[i : i + 10]) for i in (0, 10, 20)]),
        ("empty.jsonl", "paragraph", []),
    ],
)
def test_every_format_gives_its_documents(resolve, files, name, sample_by, expected, monkeypatch):
    monkeypatch.chdir(files.parent)  # names are relative to it
    assert [text.strip() for text in texts(resolve(source=f"files/{name}", sample_by=sample_by, **ALL))] == expected


def test_names_with_brackets_are_names(resolve, tmp_path):
    for name in ("a[1].txt", "a1.txt", "b [2020].jsonl"):
        text = f"this is {name}"
        (tmp_path / name).write_text(json.dumps({"text": text}) + "\n" if name.endswith("l") else text)
    assert sorted(texts(resolve(source=str(tmp_path / "a*.txt"), **ALL))) == ["this is a1.txt", "this is a[1].txt"]
    assert texts(resolve(source=str(tmp_path / "b*.jsonl"), **ALL)) == ["this is b [2020].jsonl"]


def test_files_of_several_or_unknown_formats_are_refused(resolve, files):
    for name in ("a.*", "../c4/README.md"):
        with pytest.raises(SettingError, match=r"allowed: one of .txt, .jsonl, .json, .parquet"):
            resolve(source=str(files / name), subset=None)


def test_a_directory_of_what_is_no_text_is_refused(resolve, tmp_path):
    (place := tmp_path / "notes").mkdir()
    for name in ("one.md", "two.md"):
        (place / name).write_text("some text\n")
    with pytest.raises(SettingError, match=r"most of whose files are no text that is read, such as one.md; allowed:"):
        resolve(source=str(place), **ALL)


def test_files_of_a_directory_that_are_left_out_are_said_in_one_line(corpus_settings, c4_layout, tmp_path):
    (place := tmp_path / "notes").mkdir()
    for name in ("one.txt", "two.v2.txt", "three.md", "four.md", "data", ".hidden.csv", "README.md"):
        (place / name).write_text("some text\n")
    (place / "five.txt.gz").write_bytes(gzip.compress(b"some text"))
    for source, more, said in (
        (place, ALL, [f"data.source is {place}: files read: 3 .txt, .txt.gz; left out: 2 .md, 1 without an ending"]),
        (c4_layout, {}, []),  # with its card alone
    ):
        lines = []
        sources.resolve(corpus_settings(source=str(source), **more), tmp_path / "cache", lines.append)
        assert lines == said


def test_a_missing_column_is_one_line_with_those_that_are_there(resolve, files):
    source = resolve(source=str(files / "a.parquet"), subset=None, text_field="content")
    with pytest.raises(SettingError, match=r"data.text_field is content, which .* does not have; allowed: n, text"):
        read(source)


def test_text_that_is_not_utf8_breaks_its_own_document(resolve, files):
    (files / "latin.txt").write_bytes("\n\n".join([*TEXTS[:5], "caf\xe9", *TEXTS[5:]]).encode("latin-1", "replace"))
    source = resolve(source=str(files / "latin.txt"), **ALL)
    ((pieces, _),) = read(source)
    assert select(pieces, source.train.rules)[1].skipped["not UTF-8"] >= 1


# -- broken files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("harm", ["cut", "flip", "not gzip"])
def test_a_broken_gzip_is_named_with_how_far_it_was_read(resolve, c4_layout, harm):
    file = c4_layout / "en" / "c4-train.00004-of-00010.json.gz"
    content = file.read_bytes()
    half = len(content) // 2
    flipped = content[:half] + bytes([content[half] ^ 0xFF]) + content[half + 1 :]
    file.write_bytes({"cut": content[:half], "flip": flipped, "not gzip": b"plain text"}[harm])
    seen = []
    with pytest.raises(SettingError, match=r"c4-train.00004-of-00010.json.gz cannot be read after \d+ doc.*damaged"):
        seen.extend(after for _, after in sources.read(resolve(), resolve().train, Position()))
    assert seen[-1] == Position(4, 0), "the files before it are whole"


@pytest.mark.parametrize("harm", ["cut", "flip"])
def test_a_broken_parquet_is_named(resolve, files, harm):
    file = files / "a.parquet"
    source = resolve(source=str(file), subset=None)
    content = bytearray(file.read_bytes())
    file.write_bytes(content[: len(content) // 2] if harm == "cut" else content[:4] + bytes(596) + content[600:])
    with pytest.raises(SettingError, match=r"a.parquet cannot be read after \d+ documents: "):
        read(source)


# -- positions, fingerprints, samples ---------------------------------------------------------------------------------


def test_bundles_go_on_from_any_position_as_they_were(resolve, tmp_path):
    file = tmp_path / "long.jsonl"
    lengths = [i % 7 * (3000 if i > 600 else 1) for i in range(1500)]
    file.write_text("".join(json.dumps({"text": f"{i} {'x' * n}"}) + "\n" for i, n in enumerate(lengths)))
    source = resolve(source=str(file), subset=None)
    everything = read(source)
    assert len(everything) > 8
    assert max(len(pieces) for pieces, _ in everything) == PIECES
    assert any(len(pieces) < PIECES and sum(map(len, pieces)) >= CHARACTERS for pieces, _ in everything)
    for number, (_, after) in enumerate(everything):
        assert read(source, begin=after) == everything[number + 1 :]


def test_the_fingerprint_is_of_the_documents_and_not_of_the_path(resolve, c4_layout, tmp_path):
    before = resolve().fingerprint
    assert resolve(sample_by="line").fingerprint == before, "which does nothing to JSON"
    others = ({"text_field": "url"}, {"split": "validation"}, {"tokenizer": TokenizerSettings(normalization="nfc")})
    assert len({before, *(resolve(**more).fingerprint for more in others)}) == 4
    assert resolve(source=str(c4_layout.rename(tmp_path / "moved"))).fingerprint == before
    file = tmp_path / "moved" / "en" / "c4-train.00003-of-00010.json.gz"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert resolve(source=str(tmp_path / "moved")).fingerprint != before


def test_a_sample_is_spread_over_the_files(resolve):
    source = resolve()
    found, files = {*sources.sample(source, size=30_000)}, [{*texts_of(file)} for file in source.train.files]
    assert all(found & file for file in files) and found <= set.union(*files)


def test_the_embedded_text_is_sampled_evenly_and_has_another_fingerprint_when_it_is_normalized(tmp_path, monkeypatch):
    documents = [f"document {i}" for i in range(100)]
    monkeypatch.setattr(embedded, "read", lambda: (documents, ["held out"], "f" * 64))
    source = sources.resolve(EmbeddedSettings(), tmp_path, str)
    assert texts(source) == documents and texts(source, "validation") == ["held out"]
    total = sum(map(len, documents))
    assert list(sources.sample(source, total // 3)) == documents[::4]
    assert list(sources.sample(source, total)) == documents
    assert source.fingerprint == "f" * 64
    folded = EmbeddedSettings(tokenizer=TokenizerSettings(normalization="nfkc"))
    assert sources.resolve(folded, tmp_path, str).fingerprint != source.fingerprint
