"""Report on a corpus: its size, tokenizer and rows, a few examples, and the lengths of its documents."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from adafrugal.data.rows import Layout, Window
from adafrugal.data.tokens.preparation import Plan
from adafrugal.data.tokens.store import StoredSplit

ROWS_SHOWN, CHARACTERS_SHOWN = 3, 300


def text(plan: Plan, picture: Path) -> str:
    """Return a report on the prepared tokens; draw the lengths of the documents into `picture`."""
    splits = plan.splits()
    lengths = [_lengths(split) for split in splits]
    draw(lengths[0], plan.layout.length, picture)
    columns = [_column(split, plan.layout, found) for split, found in zip(splits, lengths, strict=True)]
    skipped = sum((Counter(split.counts()["skipped"]) for split in splits), Counter[str]())
    source, cutter = plan.source, plan.tokenizer
    validation = source.about.get("validation", "documents held out by hash")
    lines = [
        f"{'source':<18} {source.name}, {len(source.train.files)} files; validation: {validation}",
        f"{'tokenizer':<18} {cutter.size:,} pieces, {np.dtype(cutter.dtype).itemsize} bytes a token",
        f"{'store':<18} {plan.directory}",
        f"{'':<18} {'training':>16} {'validation':>16}",
        *(f"{name:<18} {columns[0][name]:>16} {columns[1][name]:>16}" for name in columns[0]),
        *(f"{'  skipped':<18} {count:,}: {reason}" for reason, count in skipped.most_common()),
        "",
        *_rows(plan, splits[0]),
        "",
        f"{'picture':<18} {picture}",
    ]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def draw(lengths: np.ndarray, row: int, file: Path) -> None:
    """Draw a histogram of document lengths, int64 [documents] in tokens, as a reproducible SVG."""
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


def _lengths(split: StoredSplit) -> np.ndarray:
    """Count the tokens of each document, int64 [documents]."""
    return np.concatenate([np.empty(0, np.int64), *(np.diff(shard.ends, prepend=0) for shard in split.shards())])


def _column(split: StoredSplit, layout: Layout, lengths: np.ndarray) -> dict[str, str]:
    """Return the figures of a split by their labels."""
    counts, rows = split.counts(), split.rows(layout)
    real = sum(layout.real_tokens(shard.ends) for shard in split.shards())
    return {
        "prepared": "all" if split.ended else "the limit" if split.full else "a part",
        "documents": f"{counts['documents']:,}",
        "skipped": f"{sum(counts['skipped'].values()):,}",
        "tokens": f"{counts['tokens']:,}",
        "bytes": f"{counts['bytes']:,}",
        "tokens per byte": f"{counts['tokens'] / max(1, counts['bytes']):.4f}",
        f"rows of {layout.length}": f"{rows:,}",
        "padding": f"{1 - real / max(1, rows * layout.length):.1%}",
        "tokens in rows": f"{real / max(1, counts['tokens']):.1%}",
        "median length": f"{np.median(lengths):,.0f}" if len(lengths) else "-",
        "longest": f"{lengths.max():,}" if len(lengths) else "-",
    }


def _rows(plan: Plan, train: StoredSplit) -> list[str]:
    """Decode a few rows of the first shard."""
    lines = []
    window = Window([train.open(0)] if train.entries else [], plan.layout)
    for index in range(min(ROWS_SHOWN, window.rows)):
        number = index * window.rows // ROWS_SHOWN
        row = window.take(np.array([number]))
        real = int(row.real[0])
        shown = " ".join(plan.tokenizer.decode(row.tokens[0, :real].numpy()).split())[:CHARACTERS_SHOWN]
        lines.append(f"row {number:,} ({real} of {plan.layout.length} tokens): {shown}")
    return lines
