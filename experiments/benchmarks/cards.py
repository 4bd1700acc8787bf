"""What fits on which card: a picture of LLaMA 7B under several optimizers, and a table of cards and models.

    python experiments/benchmarks/cards.py --out experiments/results/benchmarks/cards.json [--only picture table]
    python experiments/benchmarks/cards.py --draw experiments/results/benchmarks/cards.json docs/memory_7b.svg

All of it is estimates (`adafrugal.memory`), nothing is run. The first form takes half an hour and writes the numbers;
the second draws the picture from them and prints the table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import bench

GIB = 2**30
CARDS = (8, 12, 16, 24, 80)  # GB
MODELS = ("60m", "130m", "350m", "1b", "7b")
_ROUNDED = "optimizer.stochastic_rounding=true"
_SEVEN = ("model=llama_7b", "trainer.batch_size=1", "trainer.sequence_length=256", "trainer.precision=bf16",
          "model.loss_chunk_rows=256")  # fmt: skip
_HALF = ("model.dtype=bfloat16",)
_SMALL = (*_HALF, "optimizer.state_dtype=bfloat16", _ROUNDED)
FITS = (
    "optimizer=adafrugal", "optimizer.density.start=0.05", *_HALF, _ROUNDED, "optimizer.state_dtype=int8",
    "optimizer.state_on=cpu_always_full", "trainer.activation_checkpointing=layers", "trainer.update_in_backward=true",
)  # fmt: skip
BARS = {  # of the picture: the words of each run
    "AdamW, float32": ("optimizer=adamw",),
    "AdamW, bfloat16": (*_HALF, "optimizer=adamw"),
    "GaLore, bfloat16": (*_SMALL, "optimizer=galore"),
    "FRUGAL, bfloat16": (*_SMALL, "optimizer=frugal"),
    "AdaFRUGAL, bfloat16": (*_SMALL, "optimizer=adafrugal"),
    "AdaFRUGAL, all cuts": FITS,
}
PARTS = ("weights", "gradients", "state", "activations", "temporaries and reserve", "context")
# readable on white and on black; told apart by those who do not see colours by their order
COLOURS = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377")
SHAPE = ("trainer.batch_size=16", "trainer.sequence_length=256", "trainer.precision=bf16", "optimizer=adafrugal")
COSTS = {  # of each cut: steps as measured, loss as measured (docs/memory.md)
    "model.loss_chunk_rows": "c", "trainer.activation_checkpointing": "a", "trainer.update_in_backward": "u",
    "trainer.micro_batch_size": "m", "optimizer.state_on": "o", "optimizer.state_dtype": "8", "optimizer.density": "ρ",
    "model.dtype": "w",
}  # fmt: skip


def bars() -> list[dict[str, Any]]:
    """GiB of each part of what a card must have, for each run of the picture, at its start and its end."""
    from adafrugal.memory import card
    from adafrugal.memory.estimate import estimate
    from adafrugal.settings import compose

    found = []
    for name, words in BARS.items():
        stages = estimate(compose.settings([*_SEVEN, *words])).stages
        for stage in stages:
            peak = stage.peak
            sizes = [peak.weights, peak.gradients, peak.state, peak.activations]
            sizes += [peak.temporaries + card.reserve(peak), card.CONTEXT]
            when = "" if stage.density is None else f", ρ {stage.density:.2g}"
            parts = dict(zip(PARTS, sizes, strict=True))
            found.append({"name": name + when, "words": [*_SEVEN, *words], "bytes": parts})
            print(found[-1], flush=True)
    return found


def table() -> list[dict[str, Any]]:
    """For each model and card, the cuts that suffice, and what the card must have with them."""
    from adafrugal.memory import card
    from adafrugal.memory.savings import cuts, foretold
    from adafrugal.settings import compose

    known: dict[str, Any] = {}

    def peak_of(settings: Any) -> Any:
        key = repr(settings)
        if key not in known:
            known[key] = foretold(settings)
        return known[key]

    found = []
    for model in MODELS:
        settings = compose.settings([f"model=llama_{model}", *(_SEVEN[1:4] + SHAPE[3:] if model == "7b" else SHAPE)])
        for size in CARDS:
            room = int(card.usable(size) * GIB) - card.CONTEXT
            some, last = [], peak_of(settings)
            if card.held(last) > room:
                some = list(cuts(settings, room, seconds=1e9, peak_of=peak_of))
                last = some[-1].after
            row = {"model": model, "card": size, "cuts": [cut.words for cut in some]}
            found.append(row | {"bytes": card.needed(last), "fits": card.held(last) <= room})
            print(found[-1], flush=True)
    return found


def draw(found: list[dict[str, Any]], file: Path) -> None:
    """Draw a bar for each run, stacked of its parts, with lines at the sizes of cards; the same bytes each time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    grey = "#808080"  # on white and on black
    names = [row["name"] for row in found]
    colours = {"text.color": grey, "axes.labelcolor": grey, "xtick.color": grey, "ytick.color": grey}
    with matplotlib.rc_context({"svg.hashsalt": "adafrugal", "svg.fonttype": "none", **colours}):
        figure, axes = pyplot.subplots(figsize=(9, 0.42 * len(found) + 1.6), layout="constrained")
        left = [0.0] * len(found)
        for part, colour in zip(PARTS, COLOURS, strict=True):
            sizes = [row["bytes"][part] / GIB for row in found]
            axes.barh(names, sizes, left=left, color=colour, label=part, height=0.7)
            left = [sum(pair) for pair in zip(left, sizes, strict=True)]
        for place, total in enumerate(left):
            axes.text(total + 0.025 * max(left), place, f"{total:.1f}", va="center", fontsize=8)
        for size in CARDS:
            axes.axvline(size, color=grey, linewidth=0.8, linestyle="--", zorder=3)
            name, above = str(size) if size < CARDS[-1] else f"{size} GB", axes.get_xaxis_transform()
            axes.text(size, 1.01, name, ha="center", va="bottom", fontsize=8, transform=above)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.1 * max(left))
        axes.set_xlabel("GiB of the card, by the estimate: LLaMA 7B, 256 tokens, every weight trained")
        axes.spines[:].set_visible(False)
        figure.legend(loc="outside lower center", ncols=len(PARTS), frameon=False, fontsize=8)
        figure.savefig(file, format="svg", metadata={"Date": None}, transparent=True)
        pyplot.close(figure)


def markdown(found: list[dict[str, Any]]) -> str:
    """Models × cards: the cuts that suffice by their letters, and GiB of the card."""
    rows = []
    for model in dict.fromkeys(row["model"] for row in found):
        cells = [model.upper()]
        for row in (row for row in found if row["model"] == model):
            letters = " ".join(COSTS[word.split("=")[0].removesuffix(".start")] for word in first_words(row["cuts"]))
            size = f"{row['bytes'] / GIB:.1f}"
            cells.append(f"{letters or 'as it is'}: {size}" if row["fits"] else f"no: {size}")
        rows.append(cells)
    return bench.markdown(" | ".join(["GiB", *(f"{size} GB" for size in CARDS)]), rows)


def first_words(cuts: list[str]) -> list[str]:
    """The first setting of each cut, which names it."""
    return [words.split()[0] for words in cuts]


def main() -> None:
    """Estimate, or draw what was estimated."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("cards.json"))
    parser.add_argument("--only", nargs="+", default=["picture", "table"], choices=["picture", "table"])
    parser.add_argument("--draw", nargs=2, type=Path, metavar=("JSON", "SVG"))
    given = parser.parse_args()
    if given.draw:
        found = json.loads(given.draw[0].read_text())
        draw(found["picture"], given.draw[1])
        print(markdown(found["table"]))
        return
    found = json.loads(given.out.read_text()) if given.out.exists() else {}
    for name, make in (("picture", bars), ("table", table)):
        if name in given.only:
            found[name] = make()
            bench.keep(found, given.out)


if __name__ == "__main__":
    main()
