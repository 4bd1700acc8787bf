"""What a corpus is, as a person reads it: how much there is, how it is cut, some rows, how long documents are."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from adafrugal.data.corpus import Tokens
from adafrugal.data.rows import Window
from adafrugal.data.tokens.store import StoredPart

ROWS_SHOWN, CHARACTERS_SHOWN = 3, 300


def text(tokens: Tokens, picture: Path) -> str:
    """The report of what is prepared, and the picture of the documents' lengths beside it."""
    train, validation = tokens.plan.parts()
    lengths = [_lengths(part) for part in (train, validation)]
    draw(lengths[0], tokens.layout.length, picture)
    source, cutter = tokens.source, tokens.tokenizer
    lines = [
        f"{'source':<18} {source.name}, {len(source.train.files)} files; validation: {_validation(tokens)}",
        f"{'tokenizer':<18} {cutter.size:,} pieces, {np.dtype(cutter.dtype).itemsize} bytes a token",
        f"{'store':<18} {tokens.plan.directory}",
        f"{'':<18} {'training':>16} {'validation':>16}",
        *_table(tokens, (train, validation), lengths),
        "",
        *_rows(tokens, train),
        "",
        f"{'picture':<18} {picture}",
    ]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def draw(lengths: np.ndarray, row: int, file: Path) -> None:
    """The histogram of the documents' lengths in tokens, on a logarithmic axis, as an SVG that is always the same."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "adafrugal"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3), layout="constrained")
    longest = max(2, int(lengths.max(initial=2)), row)
    axes.hist(lengths, bins=np.geomspace(1, longest + 1, 61), color="C0")
    axes.axvline(row, color="C1", label=f"a row: {row} tokens")
    axes.set_xscale("log")
    axes.set_xlabel("tokens in a document, its end included")
    axes.set_ylabel("documents")
    axes.legend(frameon=False)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def _validation(tokens: Tokens) -> str:
    return str((tokens.source.about or {}).get("validation", "documents held out by hash"))


def _lengths(part: StoredPart) -> np.ndarray:
    """The tokens of each document, int64."""
    ends = (np.diff(part.open(number).ends, prepend=0) for number in range(len(part.entries)))
    return np.concatenate([np.empty(0, np.int64), *ends])


def _table(tokens: Tokens, parts: tuple[StoredPart, StoredPart], lengths: list[np.ndarray]) -> list[str]:
    layout = tokens.layout
    skipped = [sum((Counter(entry.skipped) for entry in part.entries), Counter[str]()) for part in parts]
    counts = [[sum(getattr(e, name) for e in part.entries) for part in parts]
              for name in ("documents", "tokens", "text_bytes")]  # fmt: skip
    rows = [sum(layout.count(e.documents, e.tokens) for e in part.entries) for part in parts]
    real = [int(np.minimum(n, layout.length).sum()) if not layout.packed else r * layout.length
            for n, r in zip(lengths, rows, strict=True)]  # fmt: skip
    documents, cut, text_bytes = counts
    whole = ["all" if part.ended else "the limit" if part.full else "a part" for part in parts]
    padding = [1 - a / max(1, b * layout.length) for a, b in zip(real, rows, strict=True)]
    found = {
        "prepared": whole,
        "documents": [f"{n:,}" for n in documents],
        "skipped": [f"{n.total():,}" for n in skipped],
        "tokens": [f"{n:,}" for n in cut],
        "bytes": [f"{n:,}" for n in text_bytes],
        "tokens per byte": [f"{a / max(1, b):.4f}" for a, b in zip(cut, text_bytes, strict=True)],
        f"rows of {layout.length}": [f"{n:,}" for n in rows],
        "padding": [f"{share:.1%}" for share in padding],
        "tokens in rows": [f"{a / max(1, b):.1%}" for a, b in zip(real, cut, strict=True)],
        "median length": [f"{np.median(n):,.0f}" if len(n) else "-" for n in lengths],
        "longest": [f"{n.max():,}" if len(n) else "-" for n in lengths],
    }
    lines = [f"{name:<18} {a:>16} {b:>16}" for name, (a, b) in found.items()]
    reasons = sum(skipped, Counter[str]())
    return lines + [f"{'  skipped':<18} {count:,}: {reason}" for reason, count in reasons.most_common()]


def _rows(tokens: Tokens, train: StoredPart) -> list[str]:
    """A few rows of the first shard, decoded."""
    if not train.entries:
        return []
    window = Window([train.open(0)], tokens.layout)
    lines = []
    for index in range(min(ROWS_SHOWN, window.rows)):
        place = index * window.rows // ROWS_SHOWN
        row = window.take(np.array([place]))
        real = int(row.real[0])
        decoded = tokens.tokenizer.decode(row.tokens[0, :real])
        shown = " ".join(decoded.split())[:CHARACTERS_SHOWN]
        lines.append(f"row {place:,} ({real} of {tokens.layout.length} tokens): {shown}")
    return lines
