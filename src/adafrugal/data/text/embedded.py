"""English prose that every installation has: the docstrings of pinned packages, read from their source files.

The files are parsed, never imported, so that the text depends on the packages' versions and on nothing else.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import re
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from adafrugal.system import files, signals

PACKAGES = ("torch", "numpy")
SHORTEST = 200  # characters: what is shorter is a label, not prose
HELD_OUT = 5  # percent of the documents that are kept for validation
VERSION = 1  # of the rules on this page; part of the cache's key


@dataclass(frozen=True)
class Exported:
    """The corpus as files, a line of JSON for each document.

    Args:
        directory: of embedded-train.jsonl and embedded-validation.jsonl.
        fingerprint: of all documents.
        train_bytes: of the training part.
    """

    directory: Path
    fingerprint: str
    train_bytes: int


@dataclass(frozen=True)
class Corpus:
    """Documents, one string each, and the hash that identifies all of them.

    The same packages give the same fingerprint on every machine.
    """

    train: list[str]
    validation: list[str]
    fingerprint: str


def versions() -> dict[str, str]:
    """The packages whose docstrings are read, with their public versions ("2.13.0", whatever the build)."""
    return {package: importlib.metadata.version(package).split("+")[0] for package in PACKAGES}


def directory(cache_root: Path) -> Path:
    """Where the text is kept, named by what it depends on."""
    key = json.dumps({"packages": versions(), "rules": VERSION}, sort_keys=True)
    return cache_root / f"embedded-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def export(cache_root: Path, say: Callable[[str], None]) -> Exported:
    """The text as files under `cache_root`, written the first time; they appear only when they are whole."""
    place = directory(cache_root)
    if not place.is_dir():
        say(f"preparing the embedded text, once: docstrings of {', '.join(PACKAGES)} → {place}")
        with files.made(place) as scratch:
            _write(scratch)
    about = json.loads((place / "about.json").read_text())
    return Exported(place, about["text"], about["train_bytes"])


def _write(place: Path) -> None:
    corpus = read()
    for part, documents in (("train", corpus.train), ("validation", corpus.validation)):
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents)
        (place / f"embedded-{part}.jsonl").write_text("".join(lines), encoding="utf-8")
    about = {"text": corpus.fingerprint, "train_bytes": sum(len(text.encode()) for text in corpus.train)}
    (place / "about.json").write_text(json.dumps(about, indent=2) + "\n")


def read() -> Corpus:
    """All documents, deduplicated, the held-out part chosen by each document's hash."""
    files = [(str(file), package) for package in PACKAGES for file in _sources(package)]
    with ProcessPoolExecutor(mp_context=get_context("spawn"), initializer=signals.leave_to_the_parent) as pool:
        found = pool.map(_docstrings, [file for file, _ in files], chunksize=64)
        documents = list(_unrepeated(text for texts in found for text in texts))
    train, validation = [], []
    everything = hashlib.sha256()
    for document in documents:
        digest = hashlib.sha256(document.encode()).digest()
        everything.update(digest)
        (validation if int.from_bytes(digest[:8], "big") % 100 < HELD_OUT else train).append(document)
    return Corpus(train, validation, everything.hexdigest())


def _sources(package: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    root = Path(spec.submodule_search_locations[0])
    return sorted(root.rglob("*.py"), key=lambda file: file.relative_to(root).as_posix())


def _docstrings(file: str) -> list[str]:
    """The docstrings of a file, in its order; also long texts handed to calls such as `add_docstr(function, text)`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's invalid escapes
        try:
            tree = ast.parse(Path(file).read_bytes())
        except SyntaxError:
            return []
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if text := ast.get_docstring(node, clean=False):
                found.append((node.body[0].lineno, text))
        elif isinstance(node, ast.Call):
            found += [(node.lineno, text) for argument in node.args if (text := _literal(argument))]
    return [inspect.cleandoc(text) for _, text in sorted(found) if len(text) >= SHORTEST]


def _literal(node: ast.expr) -> str | None:
    """The text in `"…"`, `"…" + x` or `"…".format(…)`."""
    while not isinstance(node, ast.Constant):
        if isinstance(node, ast.BinOp):
            node = node.left
        elif isinstance(node, ast.Call):
            node = node.func
        elif isinstance(node, ast.Attribute):
            node = node.value
        else:
            return None
    return node.value if isinstance(node.value, str) else None


def _unrepeated(texts: Iterator[str]) -> Iterator[str]:
    """Each text less the paragraphs that stood in an earlier one, white space folded to single spaces.

    Templates repeat whole paragraphs; left in, they would stand in the training part and in the held-out part alike.
    """
    seen: set[str] = set()
    for text in texts:
        kept = []
        for paragraph in re.split(r"\n\s*\n", text):
            folded = " ".join(paragraph.split())
            if folded and folded not in seen:
                seen.add(folded)
                kept.append(folded)
        document = " ".join(kept)
        if len(document) >= SHORTEST:
            yield document
