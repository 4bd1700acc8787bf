"""The page of what `make gpu` measured."""

import json
import shutil

import pytest
from conftest import REPOSITORY

from adafrugal.reports import gpu

H100 = REPOSITORY / "experiments" / "results" / "gpu" / "h100-f852912"


@pytest.fixture
def two(tmp_path):
    """The first measurements, and later ones of another card, in which two stages did not end well."""
    for name in ("first", "second"):
        shutil.copytree(H100, tmp_path / name)
    second = tmp_path / "second"
    about = json.loads((second / "results.json").read_text())
    about |= {"date": "2027-01-02 10:00 UTC", "commit": "0123456789", "card": "Another", "changed": True}
    about["stages"] = [
        {"stage": "steps", "outcome": "timed out", "seconds": 60.0, "last": "a | b"},
        {"stage": "llama_7b", "outcome": "failed", "seconds": 3.0, "last": "no"},
        {"stage": "memory", "outcome": "passed", "seconds": 3.0, "last": ""},
    ]
    (second / "results.json").write_text(json.dumps(about))
    steps = json.loads((second / "steps.json").read_text())
    (second / "steps.json").write_text(json.dumps(steps | {"rows": steps["rows"][:2]}))
    for name in ("llama_7b", "arms"):
        (second / f"{name}.json").unlink()
    return gpu.find([tmp_path])


def test_machines_stand_side_by_side_and_what_one_did_not_measure_is_said(two):
    text = gpu.markdown(two)
    first, second = "f852912, torch 2.11.0+cu130, H100 80GB, 2026-11-26", "0123456 and changes, torch 2.11.0+cu130"
    assert f"|  | {first} | {second}, Another, 2027-01-02 |" in text
    assert "| 350m frugal blocks 0.25 | 4.40 ms, 0.95 | 4.40 ms, 0.95 |" in text
    assert "| 350m frugal columns 0.25 | 33.86 ms, 7.05 | – |" in text
    label = f"–: not measured at {second}, Another, 2027-01-02"
    assert f"{label}, where the stage steps timed out.\n" in text
    assert f"{label}, where the stage llama_7b failed.\n" in text
    assert f"{label}; it was no part of that run.\n" in text
    assert "|  |\n" not in text


def test_a_step_is_also_a_share_of_forward_and_backward_where_they_were_timed(two):
    two[1].figures["steps"]["passes"] = {"350m": {"tokens": 32768, "ms": 110.0}}
    assert "| 350m frugal blocks 0.25 | 4.40 ms, 0.95 | 4.40 ms, 0.95, 1.0% |" in gpu.markdown(two)


def test_the_share_of_the_peak_is_of_the_datasheet_and_none_where_that_is_not_known(two):
    stage = two[0].figures["loop"]
    assert gpu.mfu("NVIDIA H100 80GB HBM3", stage, 966112) == pytest.approx(6 * 41_689_600 * 966112 / 989e12)
    assert gpu.mfu("a card of tomorrow", stage, 1) is None
    rows = [line for line in gpu.markdown(two).splitlines() if "bare, adamw, compiled" in line]
    assert rows[0].endswith("| 28.3 ms, 1,159,714, 1.00, 29.3% | 28.3 ms, 1,159,714, 1.00, – |")


def test_the_table_at_the_end_has_the_figures_that_matter(two):
    lines = gpu.outcomes(two[1]).splitlines()
    assert lines[2].startswith("| steps | timed out | 60.0 | 350m frugal blocks 0.25 0.95 × AdamW; ")
    assert lines[2].endswith(" (a / b) |")
    assert lines[3] == "| llama_7b | failed | 3.0 | – (no) |"
    assert lines[4] == "| memory | passed | 3.0 | estimates from -1.0% to +0.7% |"


def test_the_committed_measurements_name_no_place_of_the_machine():
    for file in H100.parent.rglob("*.json"):
        text = file.read_text()
        assert '"/' not in text and "=/" not in text, file
