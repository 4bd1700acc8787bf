"""Columns that a page may choose."""

import pytest

from adafrugal.reports.cells import COLUMNS, MIB, peak

SUMMARIES = [
    {"tokens": 1000, "seconds": {"wall": 10.0, "forward": 2.0}, "memory": {"grown": 100 * MIB, "alone": True}},
    {
        "tokens": 1000,
        "seconds": {"wall": 14.0, "forward": 4.0, "evaluation": 1.5, "checkpoint": 0.5},
        "memory": {"peak_of_the_run": 9, "alone": False},
    },
]


@pytest.mark.parametrize(("memory", "bytes_of_the_run"), [
    ({"allocated": 1, "peak_of_the_run": 7}, 7),  # a GPU
    ({"allocated": 1, "peak_of_the_run": 7, "grown": 5, "alone": False}, 5),
    ({"peak_of_the_run": 7, "grown": 5, "alone": True}, 5),  # a CPU
    ({"peak_of_the_run": 7, "alone": False}, None),
    ({"peak_of_the_run": 7, "grown": 5}, None),  # an older record, which may be one of several runs of its process
    ({}, None),
])  # fmt: skip
def test_the_memory_of_a_run_is_known_of_a_gpu_and_of_a_process_that_made_no_other(memory, bytes_of_the_run):
    assert peak(memory) == bytes_of_the_run


def test_means_are_of_the_runs_that_have_the_number():
    names = ("seconds", "training_seconds", "forward_seconds", "refresh_seconds", "tokens")
    shown = {name: getattr(cell, "text", cell) for name in names for cell in [COLUMNS[name].cell(SUMMARIES)]}
    assert shown == {
        "seconds": "12.0 ± 2.8", "training_seconds": "11.0 ± 1.4", "forward_seconds": "3.0 ± 1.4",
        "refresh_seconds": "0.0 ± 0.0", "tokens": "1,000",
    }  # fmt: skip
    assert COLUMNS["memory"].cell(SUMMARIES).text == "100"
    assert COLUMNS["memory"].cell(SUMMARIES[1:]) == "not measured"
