"""Extract the embedded text, English prose in every installation: the docstrings of pinned packages.

Source files are parsed, not imported, so the text depends only on the packages' versions.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from adafrugal.data.text import documents, faults
from adafrugal.system import files, signals

PACKAGES = ("torch", "numpy")
SHORTEST = 200  # characters; shorter texts are labels, not prose
HELD_OUT = 5  # percent of documents used for validation
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
VERSION = 1  # of the rules in this file; part of the cache's key


def versions() -> dict[str, str]:
    """Return the packages' public versions, without the build ("2.13.0")."""
    return {package: importlib.metadata.version(package).split("+")[0] for package in PACKAGES}


def export(cache_root: Path, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]]:
    """Write the text to files, unless they exist.

    Returns:
        The directory of embedded-train.jsonl and embedded-validation.jsonl, named by a hash of the packages' versions
        and `VERSION`; what is known about them: `text`, the fingerprint of all documents; `train_bytes`, of the
        training split; `packages`, the versions that the text was made from.
    """
    place = cache_root / f"embedded-{documents.digest({'packages': versions(), 'rules': VERSION})[:12]}"
    if not place.is_dir():
        say(f"preparing the embedded text, once: docstrings of {', '.join(PACKAGES)} → {place}")
        with faults.of_disk(cache_root), files.made(place) as scratch:
            train, validation, fingerprint = read()
            for split, texts in (("train", train), ("validation", validation)):
                lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
                (scratch / f"embedded-{split}.jsonl").write_text("".join(lines), encoding="utf-8")
            about = {"text": fingerprint, "train_bytes": sum(len(text.encode()) for text in train)}
            about["packages"] = versions()
            (scratch / "about.json").write_text(json.dumps(about, indent=2) + "\n")
    about = json.loads((place / "about.json").read_text())
    return place, {"packages": versions()} | about


def read() -> tuple[list[str], list[str], str]:
    """Return the training documents, the documents held out by hash, and a hash of all documents."""
    sources = [str(file) for package in PACKAGES for file in _sources(package)]
    with ProcessPoolExecutor(mp_context=get_context("spawn"), initializer=_begin) as pool:
        found = [text for texts in pool.map(_docstrings, sources, chunksize=64) for text in texts]
    train, validation = [], []
    everything = hashlib.sha256()
    for document in _unrepeated(found):
        digest = hashlib.sha256(document.encode()).digest()
        everything.update(digest)
        (validation if int.from_bytes(digest[:8], "big") % 100 < HELD_OUT else train).append(document)
    return train, validation, everything.hexdigest()


def _begin() -> None:
    signals.leave_to_the_parent()
    gc.disable()  # it would look through every tree many times, and finds nothing


def _sources(package: str) -> list[Path]:
    root = Path(importlib.util.find_spec(package).submodule_search_locations[0])
    return sorted(root.rglob("*.py"), key=lambda file: file.relative_to(root).as_posix())


def _docstrings(file: str) -> list[str]:
    """Return long docstrings of a file, and long arguments as in `add_docstr(function, text)`, in the file's order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in the packages
        try:
            tree = ast.parse(Path(file).read_bytes())
        except SyntaxError:
            return []
    found: list[tuple[int, str]] = []
    ahead: list[Any] = [tree]
    while ahead:  # `ast.walk` takes twice as long
        node = ahead.pop()
        if isinstance(node, list):
            ahead += node
        elif isinstance(node, ast.AST):
            ahead += vars(node).values()
            if isinstance(node, ast.Call):
                found += [(node.lineno, text) for argument in node.args if (text := _literal(argument))]
            elif isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node, clean=False)):
                found.append((node.body[0].lineno, text))
    return [inspect.cleandoc(text) for _, text in sorted(found) if len(text) >= SHORTEST]


def _literal(node: ast.AST | None) -> str | None:
    """Return the text of `"…"`, `"…" + x` or `"…".format(…)`; None for other expressions."""
    inner = {ast.BinOp: "left", ast.Call: "func", ast.Attribute: "value"}
    while type(node) in inner:
        node = getattr(node, inner[type(node)])
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _unrepeated(texts: Iterable[str]) -> Iterator[str]:
    """Drop paragraphs that occurred before; replace white space by single spaces.

    Docstring templates repeat whole paragraphs, which would otherwise be in both splits.
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
