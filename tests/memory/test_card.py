"""What a card must have, against what runs on an H100 and an H200 took."""

import json
from pathlib import Path

import pytest

from adafrugal.memory import card
from adafrugal.memory.trace import Footprint
from adafrugal.system.errors import SettingError

GIB = 2**30
MEASURED = Path(__file__).parents[2] / "experiments/results/gpu"


def measured(run, stage):
    rows = json.loads((MEASURED / run / f"{stage}.json").read_text())["rows"]
    return {row["name"]: row for row in rows}


def test_no_run_that_was_measured_took_more():
    """Weights and state of the models are known; the rest of what was allocated came and went."""
    found = measured("h100-f852912", "memory")
    for name, entries, state in (("60m", 58_074_624, 4), ("350m", 367_970_304, 8)):
        row = found[f"{name} {'signsgd' if state == 4 else 'adamw'}"]
        lasting = entries * (4 + state)
        peak = Footprint(entries * 4, 0, entries * state, 0, row["allocated"] - lasting, "backward")
        assert row["reserved"] <= row["allocated"] + card.reserve(peak) < 1.15 * row["reserved"]
        assert row["used"] <= card.needed(peak)


def test_a_7b_is_foretold_within_half_a_gib():
    for run in ("h100-f852912", "h100-54c813b", "h200-697e9dc"):
        for row in measured(run, "llama_7b").values():
            lasting = row["allocated"] - int(0.4 * GIB)  # a gradient and its update
            peak = Footprint(lasting, 0, 0, 0, row["allocated"] - lasting, "backward")
            assert 0 <= card.needed(peak) - row["used"] < 0.5 * GIB


def test_a_size_is_of_tensors_or_of_a_card():
    assert card.of_words("14.5") == card.Budget(14.5, "--fits 14.5")
    sizes = {"8GB": 7.5, "12gb": 11.5, "16 GB": 15.5, "24GB": 23.5, "40GB": 39, "48GB": 47, "80GB": 79}
    assert {words: card.of_words(words).gib for words in sizes} == sizes
    assert all(card.of_words(words).whole for words in sizes)


@pytest.mark.parametrize("words", ["-1", "0", "nan", "inf", "0.5GB", "GB", "16TB", ""])
def test_another_size_is_refused(words):
    with pytest.raises(SettingError, match=r"--fits is .*; allowed: GiB of tensors above 0, such as 14.5, or a card's"):
        card.of_words(words)
