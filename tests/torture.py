"""How long the fault suite is, what it compares, and its counts.

`make test` runs a short form of it, `make torture` the long one (ADAFRUGAL_TORTURE=1), which prints its counts and
writes them to experiments/results/faults.json.
"""

import hashlib
import json
import os
from collections import Counter
from pathlib import Path

import pytest

from adafrugal.tracking.record import Record

LONG = os.environ.get("ADAFRUGAL_TORTURE") == "1"
RESULTS = Path(__file__).resolve().parents[1] / "experiments" / "results" / "faults.json"
TIMED = ("seconds", "elapsed", "tokens_per_second", "memory", "time", "optimizer_share")
TALLY = "survived"
FEWER = "it touches fewer"  # files than a test is made for, which leaves nothing untried


@pytest.fixture
def tally(record_property):
    """A function to call when a fault has been survived: what it was -> None."""
    return lambda what: record_property(TALLY, what)


def pytest_terminal_summary(terminalreporter):
    if not LONG:
        return
    stats = terminalreporter.stats
    found = Counter(
        value for report in stats.get("passed", []) for name, value in report.user_properties if name == TALLY
    )
    is_whole = {"instants", "arms", "faults", "inputs"} <= {what.partition(":")[0] for what in found}
    for report in stats.get("skipped", []):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if reason != FEWER:
            found[f"not tried: {reason}"] += 1
    found["losses"] = len(stats.get("failed", [])) + len(stats.get("error", []))
    for what, n in found.items():
        terminalreporter.write_line(f"{n:6}  {what}")
    if is_whole:
        RESULTS.write_text(json.dumps(dict(sorted(found.items())), indent=2) + "\n")


def table(found):
    """The counts of the long form, in Markdown."""
    return "\n".join(["| tried | times |", "| --- | ---: |", *(f"| {what} | {n} |" for what, n in found.items())])


def record_under(root):
    """The one run under a run_root."""
    (status,) = root.glob("*/*/status.json")
    return Record(status.parent)


def end_of(root):
    """What an undisturbed run and a disturbed one must have alike: metrics, what happened, summary, final weights."""
    record = record_under(root)
    assert record.status == "finished"
    happened = [event for event in record.events() if event["event"] in ("refresh", "shrink", "interval", "nonfinite")]
    newest = max((record.directory / "checkpoints").glob("step-*"))
    weights = hashlib.sha256((newest / "model.safetensors").read_bytes()).hexdigest()
    return [_untimed(value) for value in (record.metrics(), happened, record.summary())] + [weights]


def _untimed(value):
    if isinstance(value, list):
        return [_untimed(part) for part in value]
    if isinstance(value, dict):
        return {key: _untimed(part) for key, part in value.items() if key not in TIMED}
    return "nan" if value != value else value  # which is not equal to itself
