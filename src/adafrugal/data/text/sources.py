"""Where documents come from: which files a corpus has, and reading them in order through `datasets.load_dataset`."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from adafrugal.data.text import embedded, faults
from adafrugal.data.text.documents import Rules, select
from adafrugal.settings.schema import CorpusSettings, EmbeddedSettings
from adafrugal.system.errors import SettingError

FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
PIECES, CHARACTERS = 256, 1 << 20  # of a bundle, whichever comes first
RETRIES = 4  # of a file that the network refuses, 10 to 80 seconds after each other
SAMPLED_FILES = 64  # that a tokenizer's sample is spread over
MEMO = 1  # the form in which a repository's files are kept
ENDS = 1 << 16  # bytes at the beginning and the end of a local file that are part of its fingerprint


@dataclass(frozen=True)
class Part:
    """The training or the validation part of a corpus.

    Args:
        files: as load_dataset takes them, in order.
        rules: which documents of them are of this part.
    """

    files: tuple[str, ...]
    rules: Rules


@dataclass(frozen=True)
class Source:
    """A corpus whose files are known.

    Args:
        name: what a person calls it.
        format: the loader of `datasets` that reads its files: json, text, parquet, …
        text_field: the column that is read.
        sample_by: what one document of a text file is.
        train, validation: its two parts.
        fingerprint: the same for the same documents, as far as the files' names, sizes and ends tell.
        text_bytes: of the training part, where it is known.
        about: what else is worth a line in a record.
    """

    name: str
    format: str
    text_field: str
    sample_by: str
    train: Part
    validation: Part
    fingerprint: str
    text_bytes: int | None = None
    about: dict[str, Any] | None = None

    def described(self) -> dict[str, Any]:
        """As plain values, for a record."""
        files = {part: len(getattr(self, part).files) for part in ("train", "validation")}
        return {"name": self.name, "fingerprint": self.fingerprint, "files": files, **(self.about or {})}


@dataclass(frozen=True, order=True)
class Position:
    """How far a part has been read: the number of a file, and of a piece (a row, a line) in it."""

    file: int = 0
    piece: int = 0


@dataclass(frozen=True)
class Bundle:
    """Some pieces of a file, and where the next bundle begins."""

    pieces: list[Any]
    after: Position


def resolve(data: EmbeddedSettings, cache_root: Path, say: Callable[[str], None]) -> Source:
    """The corpus that the settings name.

    A hub repository is asked for its files once; which they are, and of which revision, is kept under `cache_root`,
    so that later runs read the same and need no network until they need more text.

    Raises:
        SettingError: it is not there or not shown, or it has no such subset, split or field.
    """
    if not isinstance(data, CorpusSettings):
        found = embedded.export(cache_root, say)
        rules = Rules(json_lines=True, text_field="text", normalization=data.tokenizer.normalization)
        files = (str(found.directory / f"embedded-{part}.jsonl") for part in ("train", "validation"))
        train, validation = (Part((file,), rules) for file in files)
        fingerprint, form = found.fingerprint, data.tokenizer.normalization
        if form != "none":
            fingerprint = _digest([fingerprint, form])
        about = {"packages": embedded.versions()}
        return Source("the embedded text", "json", "text", "line", train, validation, fingerprint,
                      found.train_bytes, about)  # fmt: skip
    named = str(data.source)
    if glob.has_magic(named) or Path(named).is_file():
        return _of_files(data, sorted(glob.glob(named, recursive=True)))  # noqa: PTH207 - a name may be absolute
    if Path(named).is_dir():
        with faults.of_hub("data.source", named):
            return _source(data, *_of_layout(data))
    is_file = _format(named) is not None or Path(named).suffix in COMPRESSIONS
    if named.startswith((".", "/", "~")) or named.count("/") != 1 or is_file:
        raise SettingError(
            f"data.source is {named}, and there is no such file or directory; allowed: a directory, a file name with "
            "* and ? (in quotes), or a hub repository such as allenai/c4"
        )
    asked = [data.source, data.subset, data.revision, MEMO]
    memo = cache_root / "sources" / f"{named.replace('/', '--')}-{_digest(asked)[:12]}"
    if not memo.is_dir():
        say(f"asking the hub which files {named} has, once")
        found = _of_hub(data)
        with files.made(memo) as scratch:
            (scratch / "files.json").write_text(json.dumps(found, indent=1))
    return _source(data, *json.loads((memo / "files.json").read_text()))


def read(source: Source, part: Part, begin: Position) -> Iterator[Bundle]:
    """The pieces of a part from a position on, in bundles that do not depend on where reading began.

    Raises:
        SettingError: a file cannot be read to its end.
    """
    for number in range(begin.file, len(part.files)):
        skip = begin.piece if number == begin.file else 0
        yield from _bundles(source, part.files[number], number, skip)


def sample(source: Source, size: int) -> Iterator[str]:
    """About `size` bytes of the training part's documents, spread over all of it.

    Every k-th document where the length of the text is known; else an equal share from the beginning of up to 64 files.

    Raises:
        SettingError: a file cannot be read, or has no such text field.
    """
    part, skipped = source.train, Counter[str]()
    if source.text_bytes is not None:
        every = max(1, -(-source.text_bytes // size))
        texts = (text for bundle in read(source, part, Position()) for text in select(bundle.pieces, part.rules).texts)
        yield from (text for number, text in enumerate(texts) if number % every == 0)
        return
    count, found_any = min(len(part.files), SAMPLED_FILES), False
    for index in range(count):
        number, taken = index * len(part.files) // count, 0
        for bundle in _bundles(source, part.files[number], number, 0):
            found = select(bundle.pieces, part.rules)
            found_any = found_any or bool(found.texts)
            skipped.update(found.skipped)
            if found.fields and not found_any:
                _refuse_missing(source.text_field, found.fields, source)
            yield from found.texts
            taken += sum(len(text.encode()) for text in found.texts)
            if taken >= size // count:
                break
    if not found_any:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in skipped.most_common()) or "it is empty"
        raise SettingError(f"data.source is {source.name}, which has no text that could be read: {reasons}")


# -- which files ------------------------------------------------------------------------------------------------------


def _of_files(data: CorpusSettings, files: list[str]) -> Source:
    named = f"data.source is {data.source}"
    if data.subset is not None:
        raise SettingError(f"data.subset is {data.subset}, and {named}: files have none; allowed: null")
    if not files:
        raise SettingError(f"{named}, which no file matches; write it in quotes, relative to the current directory")
    formats = {_format(file) for file in files}
    if len(formats) > 1 or None in formats:
        endings = sorted({"".join(Path(file).suffixes[-2:]) or Path(file).name for file in files})
        allowed = ", ".join(FORMATS)
        raise SettingError(f"{named}: {', '.join(endings)}; allowed: one of {allowed} (json: one object a line; +.gz)")
    return _source(data, formats.pop() or "", {data.split: files})


def _format(file: str) -> str | None:
    suffixes = [s for s in Path(file).suffixes if s not in COMPRESSIONS]
    return FORMATS.get(suffixes[-1]) if suffixes else None


def _of_hub(data: CorpusSettings) -> tuple[str, dict[str, list[str]]]:
    named = Path(str(data.source))
    try:
        with faults.of_hub("data.source", str(named)):
            return _of_layout(data)
    except SettingError as error:
        if named.parent.is_dir():  # then it was perhaps no repository that was meant
            raise SettingError(f"{error}; the directory {named.parent} here has no {named.name}") from error
        raise


def _of_layout(data: CorpusSettings) -> tuple[str, dict[str, list[str]]]:
    """The loader and the files of each split of a directory or a repository as the hub lays them out."""
    import datasets

    datasets.disable_progress_bars()
    try:
        builder = datasets.load_dataset_builder(str(data.source), data.subset, revision=data.revision)
    except (ValueError, RuntimeError) as error:  # no such subset, several and none is named, or only a script
        reason = " ".join(str(error).split()).partition(" Example of usage")[0]
        subset = data.subset or "null"
        raise SettingError(f"data.source is {data.source}, data.subset is {subset}: {reason}") from error
    files = builder.config.data_files
    if not files:
        raise SettingError(f"data.source is {data.source}, which has no data files that datasets can read")
    return type(builder).__module__.rsplit(".", 1)[-1], {str(split): list(found) for split, found in files.items()}


def _source(data: CorpusSettings, form: str, splits: dict[str, list[str]]) -> Source:
    name, validation = str(data.source), data.validation_split
    for setting, split in (("split", data.split), ("validation_split", validation)):
        if split is not None and split not in splits:
            raise SettingError(f"data.{setting} is {split}, which {name} does not have; allowed: {', '.join(splits)}")
    if validation is None and "validation" in splits and data.split != "validation":
        validation = "validation"
    rules = Rules(form == "json", data.text_field, normalization=data.tokenizer.normalization)
    address = next((file for file in splits[data.split] if file.startswith("hf://")), "")
    about: dict[str, Any] = {"revision": address.partition("@")[2].partition("/")[0] or None}
    if validation:
        parts = [Part(tuple(splits[split]), rules) for split in (data.split, validation)]
        about["validation"] = f"split {validation}"
    else:
        files = tuple(splits[data.split])
        parts = [Part(files, replace(rules, keep=k, held_out=data.held_out)) for k in ("rest", "held_out")]
        about["validation"] = f"{data.held_out:.2%} of the documents, by hash"
    how = data.sample_by if form == "text" else data.text_field
    identity = [form, how, *([*_identity(p.files), asdict(p.rules)] for p in parts)]
    return Source(name, form, data.text_field, data.sample_by, *parts, _digest(identity), about=about)


def _identity(files: Iterable[str]) -> list[Any]:
    """What tells these files from others: of local ones names, sizes and ends, of the hub's the address."""
    found = [Path(file) for file in files]
    if str(next(iter(files))).startswith("hf://"):
        return list(files)
    above = os.path.commonpath([file.parent for file in found])
    return [[file.relative_to(above).as_posix(), file.stat().st_size, _ends(file)] for file in found]


def _ends(file: Path) -> str:
    with file.open("rb") as opened:
        digest = hashlib.sha256(opened.read(ENDS))
        opened.seek(max(0, file.stat().st_size - ENDS))
        digest.update(opened.read(ENDS))
    return digest.hexdigest()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


# -- reading them -----------------------------------------------------------------------------------------------------


def _bundles(source: Source, file: str, number: int, skip: int) -> Iterator[Bundle]:
    pieces: list[Any] = []
    characters, read_so_far = 0, skip
    for piece in _pieces(source, file, skip):
        pieces.append(piece)
        characters += len(piece or "")
        if len(pieces) == PIECES or characters >= CHARACTERS:
            read_so_far += len(pieces)
            yield Bundle(pieces, Position(number, read_so_far))
            pieces, characters = [], 0
    yield Bundle(pieces, Position(number + 1, 0))


def _pieces(source: Source, file: str, skip: int) -> Iterator[Any]:
    """The lines, rows or texts of one file after the first `skip`; a network that fails for a while is waited for."""
    done, failures = skip, 0
    while True:
        try:
            for values in _after(_columns(source, file), done):
                done, failures = done + len(values), 0
                yield from values
            return
        except SettingError:
            raise
        except Exception as error:  # of gzip, pyarrow, fsspec, the hub's client, …
            failures += 1
            if failures > RETRIES or not faults.may_pass(error):
                raise SettingError(faults.explain_file(error, file, done)) from error
            time.sleep(5 * 2**failures)


def _after(columns: Iterable[Any], skip: int) -> Iterator[list[Any]]:
    """The values of arrow arrays after the first `skip`."""
    for column in columns:
        if skip < len(column):
            yield _values(column.slice(skip))
        skip = max(0, skip - len(column))


def _columns(source: Source, file: str) -> Iterator[Any]:
    """The texts of a file as arrow's chunked arrays; JSON as lines, so that a broken one costs only itself."""
    import datasets
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs is raised, too
    datasets.disable_progress_bars()
    datasets.config.STREAMING_READ_MAX_RETRIES = 3  # `_pieces` does the waiting
    exactly = file if file.startswith("hf://") else glob.escape(file)
    form, name, options = source.format, source.text_field, {}
    if form in ("json", "text"):
        sample_by = "line" if form == "json" else source.sample_by
        form, name, options = "text", "text", {"sample_by": sample_by, "encoding_errors": "adafrugal_invalid"}
    elif form == "parquet":
        found = datasets.load_dataset(form, data_files=[exactly], split="train", streaming=True).column_names
        _refuse_missing(name, found, source)
        options = {"columns": [name], "batch_size": PIECES}
    rows = datasets.load_dataset(form, data_files=[exactly], split="train", streaming=True, **options)
    for table in rows.with_format("arrow").iter(batch_size=4 * PIECES):
        _refuse_missing(name, table.column_names, source)
        yield table.column(name)


def _refuse_missing(name: str, found: list[str] | None, source: Source) -> None:
    if found is not None and name not in found:
        raise SettingError(f"data.text_field is {name}, which {source.name} does not have; allowed: {', '.join(found)}")


def _values(column: Any) -> list[Any]:
    """As Python's; what is not UTF-8 as bytes."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        import pyarrow

        return [_decoded(raw) for raw in column.cast(pyarrow.large_binary()).to_pylist()]


def _decoded(raw: bytes | None) -> str | None:
    return None if raw is None else raw.decode(errors="adafrugal_invalid")
