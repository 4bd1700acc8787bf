"""Find the files of a corpus and read them in order through `datasets.load_dataset`."""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from adafrugal.data.text import embedded, faults
from adafrugal.data.text.documents import Rules, digest, select
from adafrugal.settings.repositories import is_path
from adafrugal.settings.schema import CorpusSettings, EmbeddedSettings
from adafrugal.system import files
from adafrugal.system.errors import SettingError

FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
LOADERS = {*FORMATS.values(), "csv", "arrow"}  # of datasets, which has others for pictures, proteins, …
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
PIECES, CHARACTERS = 256, 1 << 20  # limits of a bundle; the first one reached closes it
RETRIES = 4  # of a file after network errors, with waits of 10 to 80 seconds
SAMPLED_FILES = 64  # most files in a tokenizer's sample
MEMO = 1  # version of the cached list of a repository's files
ENDS = 1 << 16  # bytes at each end of a local file that its fingerprint covers


@dataclass(frozen=True)
class Split:
    """The training or the validation split of a source."""

    files: tuple[str, ...]  # paths or addresses for load_dataset, in order
    rules: Rules  # which documents of the files belong to the split


@dataclass(frozen=True)
class Source:
    """A corpus and its files."""

    name: str  # for messages
    format: str  # the `datasets` loader of its files: text (for lines of JSON, too), parquet, …
    sample_by: str  # the unit of a text file that is one piece: line, paragraph or document
    train: Split
    validation: Split
    fingerprint: str  # equal for equal documents, judged by files' names, sizes and ends, or addresses at the hub
    text_bytes: int | None = None  # of the training split; None if unknown
    about: dict[str, Any] = field(default_factory=dict)  # more entries for a record

    def described(self) -> dict[str, Any]:
        """Return plain values that describe the source, for a record."""
        files = {"train": len(self.train.files), "validation": len(self.validation.files)}
        return {"name": self.name, "fingerprint": self.fingerprint, "files": files, **self.about}


class Position(NamedTuple):
    """A position in a split: the number of a file, and of a piece (row, line) in it."""

    file: int = 0
    piece: int = 0


def resolve(data: EmbeddedSettings, cache_root: Path, say: Callable[[str], None]) -> Source:
    """Find the corpus that the settings name.

    The hub is asked for a repository's files once. The list and its revision are kept under `cache_root`, so that later
    runs read the same files and need no network until they need more text.

    Raises:
        SettingError: it is missing or not accessible, its format is unknown, or it has no such subset or split.
    """
    if not isinstance(data, CorpusSettings):
        return _embedded(data, cache_root, say)
    named = str(data.source)
    if glob.has_magic(named) or Path(named).is_file():
        return _source(data, *_of_files(data, sorted(glob.glob(named, recursive=True))))  # noqa: PTH207 - may be absolute
    if Path(named).is_dir():
        loader, splits = _of_layout(data)
        if left_out := _left_out(Path(named), splits):
            say(left_out)
        return _source(data, loader, splits)
    if is_path(named) or _format(named) or Path(named).suffix in COMPRESSIONS:
        raise SettingError(
            f"data.source is {named}, and there is no such file or directory; allowed: a directory, a file name with "
            "* and ? (in quotes), or a hub repository such as allenai/c4"
        )
    asked = [data.source, data.subset, data.revision, MEMO]
    memo = cache_root / "sources" / f"{named.replace('/', '--')}-{digest(asked)[:12]}"
    if not memo.is_dir():
        say(f"asking the hub which files {named} has, once")
        try:
            found = _of_layout(data)
        except SettingError as error:
            directory, name = named.split("/")
            if Path(directory).is_dir():  # perhaps a local path was meant
                raise SettingError(f"{error}; the directory {directory} here has no {name}") from error
            raise
        with faults.of_disk(memo.parent), files.made(memo) as scratch:
            (scratch / "files.json").write_text(json.dumps(found, indent=1))
    return _source(data, *json.loads((memo / "files.json").read_text()))


def read(source: Source, split: Split, begin: Position) -> Iterator[tuple[list[Any], Position]]:
    """Yield bundles of pieces from a position on, each with the position of the next one.

    From any such position the bundles are the same.

    Raises:
        SettingError: a file cannot be read to its end.
    """
    for number in range(begin.file, len(split.files)):
        so_far = begin.piece if number == begin.file else 0
        pieces, characters = [], 0
        for piece in _pieces(source, split.files[number], so_far):
            pieces.append(piece)
            characters += len(piece or "")
            if len(pieces) == PIECES or characters >= CHARACTERS:
                so_far += len(pieces)
                yield pieces, Position(number, so_far)
                pieces, characters = [], 0
        yield pieces, Position(number + 1, 0)


def sample(source: Source, size: int) -> Iterator[str]:
    """Yield about `size` bytes of the training split's documents, spread over the split.

    Take every k-th document if the split's length is known, else equal shares from the beginnings of up to 64 files.

    Raises:
        SettingError: a file cannot be read, or has no text or no such text field.
    """
    split, skipped = source.train, Counter[str]()
    if source.text_bytes is not None:
        every = max(1, -(-source.text_bytes // size))
        texts = (text for pieces, _ in read(source, split, Position()) for text in select(pieces, split.rules)[0])
        yield from itertools.islice(texts, 0, None, every)
        return
    count, found_any = min(len(split.files), SAMPLED_FILES), False
    for index in range(count):
        file, taken = split.files[index * len(split.files) // count], 0
        for pieces, _ in read(source, replace(split, files=(file,)), Position()):
            texts, counts = select(pieces, split.rules)
            found_any = found_any or bool(texts)
            skipped.update(counts.skipped)
            if counts.fields and not found_any:
                refuse_missing_field(source, counts.fields)
            yield from texts
            taken += sum(len(text.encode()) for text in texts)
            if taken >= size // count:
                break
    if not found_any:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in skipped.most_common()) or "it is empty"
        raise SettingError(f"data.source is {source.name}, which has no text that could be read: {reasons}")


def refuse_missing_field(source: Source, found: Sequence[str]) -> None:
    """Raise SettingError, since the text field is not among those found."""
    name = source.train.rules.text_field
    raise SettingError(f"data.text_field is {name}, which {source.name} does not have; allowed: {', '.join(found)}")


# -- finding the files ------------------------------------------------------------------------------------------------


def _embedded(data: EmbeddedSettings, cache_root: Path, say: Callable[[str], None]) -> Source:
    directory, about = embedded.export(cache_root, say)
    form = data.tokenizer.normalization
    rules = Rules(json_lines=True, text_field="text", normalization=form)
    splits = (Split((str(directory / f"embedded-{name}.jsonl"),), rules) for name in ("train", "validation"))
    fingerprint = about["text"] if form == "none" else digest([about["text"], form])
    more = {"packages": about["packages"]}
    return Source("the embedded text", "text", "line", *splits, fingerprint, about["train_bytes"], more)


def _of_files(data: CorpusSettings, found: list[str]) -> tuple[str, dict[str, list[str]]]:
    """Return the loader of files, and the files by split."""
    named = f"data.source is {data.source}"
    if data.subset is not None:
        raise SettingError(f"data.subset is {data.subset}, and {named}: files have none; allowed: null")
    if not found:
        raise SettingError(f"{named}, which no file matches; write it in quotes, relative to the current directory")
    formats = {_format(file) for file in found}
    if len(formats) > 1 or None in formats:
        endings = sorted({"".join(Path(file).suffixes[-2:]) or Path(file).name for file in found})
        allowed = ", ".join(FORMATS)
        raise SettingError(f"{named}: {', '.join(endings)}; allowed: one of {allowed} (json: one object a line; +.gz)")
    return formats.pop(), {data.split: found}


def _format(file: str) -> str | None:
    suffixes = [s for s in Path(file).suffixes if s not in COMPRESSIONS]
    return FORMATS.get(suffixes[-1]) if suffixes else None


def _of_layout(data: CorpusSettings) -> tuple[str, dict[str, list[str]]]:
    """Return the loader of a directory or repository in the hub's layout, and its files by split."""
    import datasets

    datasets.disable_progress_bars()
    name = str(data.source)
    otherwise = f"data.source is {name}, data.subset is {data.subset or 'null'}"  # no such subset, a script, …
    with faults.of_hub("data.source", name, otherwise):
        builder = datasets.load_dataset_builder(name, data.subset, revision=data.revision)
    if not builder.config.data_files:
        raise SettingError(f"data.source is {name}, which has no data files that datasets can read")
    splits = {str(split): list(found) for split, found in builder.config.data_files.items()}
    loader = type(builder).__module__.rsplit(".", 1)[-1]
    if loader not in LOADERS:
        file = Path(next(iter(splits.values()))[0]).name
        raise SettingError(
            f"data.source is {name}, most of whose files are no text that is read, such as {file}; allowed: files of "
            f"{', '.join((*FORMATS, '.csv', '.arrow'))}, or a pattern in quotes such as '{name}/*.txt'"
        )
    return loader, splits


def _left_out(directory: Path, splits: dict[str, list[str]]) -> str:
    """Return a line if a directory has files of other endings than those that are read, beside its card."""
    read = Counter(_ending(Path(file)) for found in splits.values() for file in found)
    files = (file for file in directory.rglob("*") if file.is_file() and file.name != "README.md")
    seen = (file for file in files if not any(part.startswith(".") for part in file.relative_to(directory).parts))
    other = Counter(ending for file in seen if (ending := _ending(file)) not in read)
    if not other:
        return ""
    left_out = ", ".join(f"{count:,} {ending}" for ending, count in other.most_common())
    return f"data.source is {directory}: files read: {read.total():,} {', '.join(sorted(read))}; left out: {left_out}"


def _ending(file: Path) -> str:
    return "".join(file.suffixes[-2 if file.suffix in COMPRESSIONS else -1 :]) or "without an ending"


def _source(data: CorpusSettings, form: str, splits: dict[str, list[str]]) -> Source:
    name, validation = str(data.source), data.validation_split
    for setting, split in (("split", data.split), ("validation_split", validation)):
        if split is not None and split not in splits:
            raise SettingError(f"data.{setting} is {split}, which {name} does not have; allowed: {', '.join(splits)}")
    if validation is None and "validation" in splits and data.split != "validation":
        validation = "validation"
    rules = Rules(form == "json", data.text_field, normalization=data.tokenizer.normalization)
    files = tuple(splits[data.split])
    revision = files[0].partition("@")[2].partition("/")[0] if files[0].startswith("hf://") else None
    if validation:
        found, chosen = [Split(files, rules), Split(tuple(splits[validation]), rules)], f"split {validation}"
    else:
        found = [Split(files, replace(rules, keep=k, held_out=data.held_out)) for k in ("rest", "held_out")]
        chosen = f"{data.held_out:.2%} of the documents, by hash"
    how = data.sample_by if form == "text" else data.text_field
    fingerprint = digest([form, how, *([*_identity(split.files), asdict(split.rules)] for split in found)])
    loader, unit = ("text", "line") if form == "json" else (form, data.sample_by)  # a line of JSON can fail alone
    return Source(name, loader, unit, *found, fingerprint, about={"revision": revision, "validation": chosen})


def _identity(files: Sequence[str]) -> list[Any]:
    """Return values that identify files: local names, sizes and hashes of both ends, or addresses at the hub."""
    if files[0].startswith("hf://"):
        return list(files)
    found, above = [], os.path.commonpath([Path(file).parent for file in files])
    for file in map(Path, files):
        size = file.stat().st_size
        with file.open("rb") as opened:
            ends = opened.read(ENDS)
            opened.seek(max(0, size - ENDS))
            ends += opened.read(ENDS)
        found.append([file.relative_to(above).as_posix(), size, hashlib.sha256(ends).hexdigest()])
    return found


# -- reading the files ------------------------------------------------------------------------------------------------


def _pieces(source: Source, file: str, skip: int) -> Iterator[Any]:
    """Yield the lines, rows or texts of a file after the first `skip`; retry after network errors."""
    done, failures = skip, 0
    while True:
        try:
            skip = done
            for column in _columns(source, file):
                if skip < len(column):
                    values = _values(column.slice(skip))
                    done, failures = done + len(values), 0
                    yield from values
                skip = max(0, skip - len(column))
            return
        except SettingError:
            raise
        except Exception as error:  # from gzip, pyarrow, fsspec, the hub's client, …
            failures += 1
            if failures > RETRIES or not faults.may_pass(error):
                raise SettingError(faults.explain_file(error, file, done)) from error
            time.sleep(5 * 2**failures)


def _columns(source: Source, file: str) -> Iterator[Any]:
    """Yield the pieces of a file as arrow's chunked arrays."""
    import datasets
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # logged errors are raised, too
    datasets.disable_progress_bars()
    datasets.config.STREAMING_READ_MAX_RETRIES = 1  # it would lose what a failed read had decompressed; see `_pieces`
    exactly = file if file.startswith("hf://") else glob.escape(file)
    load = partial(datasets.load_dataset, source.format, data_files=[exactly], split="train", streaming=True)
    name, options = source.train.rules.text_field, {}
    if source.format == "text":
        name, options = "text", {"sample_by": source.sample_by, "encoding_errors": "adafrugal_invalid"}
    elif source.format == "parquet":
        found = load().column_names
        if found is not None and name not in found:
            refuse_missing_field(source, found)
        options = {"columns": [name], "batch_size": PIECES}
    for table in load(**options).with_format("arrow").iter(batch_size=4 * PIECES):
        if name not in table.column_names:
            refuse_missing_field(source, table.column_names)
        yield table.column(name)


def _values(column: Any) -> list[Any]:
    """Convert arrow values to Python's; replace undecodable bytes by INVALID."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        import pyarrow

        raws = column.cast(pyarrow.large_binary()).to_pylist()
        return [None if raw is None else raw.decode(errors="adafrugal_invalid") for raw in raws]
