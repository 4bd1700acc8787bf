"""`make gpu`: on a CPU in its short form, and with stages that fail."""

import json
import re
import signal
import subprocess
import time
from argparse import Namespace
from pathlib import Path

import pytest
from conftest import REPOSITORY, script
from torture import LONG

from adafrugal.reports import gpu as page
from adafrugal.settings import compose

STAGES = ["tests", "arms", "memory", "steps", "loop", "loop_small", "llama_7b"]


def test_it_runs_on_a_cpu_in_a_short_form(cache_root, tmp_path, capsys, monkeypatch):
    """All stages in the long form of the fault suite, else one that steps an optimizer and one that trains."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # it ends with SIGTERM
    chosen, out = STAGES if LONG else ["steps", "loop"], tmp_path / "out"
    command = ["--device", "cpu", "--out", str(out), "--cache", str(cache_root), "--stages", *chosen]
    assert script("gpu").main(command) == 0, (out / "log.txt").read_text()
    assert len(list(out.iterdir())) <= 8
    found, said = page.read(out), capsys.readouterr().out
    assert [stage["stage"] for stage in found.about["stages"]] == chosen
    assert {stage["outcome"] for stage in found.about["stages"]} == {"passed"}
    assert {"commit", "date", "python", "torch", "transformers", "cuda"} <= found.about.keys()
    assert f"{page.outcomes(found)}\n\nresults in {out}\n" in said
    assert [loop["loop"] for loop in found.figures["loop"]["loops"]] == ["bare", "train.py", "train.py"]
    if LONG:
        assert "| tests | passed |" in said
        assert "1 skipped" in said
        assert "2 of 2 ran to their end" in said
        assert all(arm["checkpoint"] and arm["steps"] == 2 for arm in found.figures["arms"]["arms"])
        assert "Not measured yet" not in page.markdown([found]).replace("compiling and memory\n\nNot measured yet.", "")


def test_a_stage_that_fails_or_takes_too_long_stops_no_other(tmp_path, capsys):
    gpu, note = script("gpu"), tmp_path / "child"
    slow = f"(sleep 1; touch {note}) & echo so far; sleep 60"
    wanted = [
        gpu.Stage("arms", ["sh", "-c", "echo so far; echo broken; exit 1"], 10),
        gpu.Stage("steps", ["sh", "-c", slow], 0.5, beside=True),
        gpu.Stage("tests", ["echo", "tests/a.py::test_b PASSED [100%]"], 10, writes=False),
    ]
    about = {"date": "2026-01-01", "commit": "unknown", "device": "cpu", "torch": "2"}
    ended = gpu.carry_out(wanted, tmp_path / "out", about)
    assert [stage["outcome"] for stage in ended] == ["failed", "timed out", "passed"]
    assert ended[0]["last"] == "broken"
    assert ended[2]["tests"]["passed"] == 1
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == about | {"stages": ended}
    text = page.outcomes(page.read(tmp_path / "out"))
    assert "| arms | failed |" in text
    assert "(broken)" in text
    time.sleep(0.7)
    assert not note.exists(), "what a stage started ends with it"


@pytest.mark.parametrize(("said", "counts", "failed"), [
    ("tests/a.py::test_b PASSED [ 50%]\ntests/a.py::test_c[x y] SKIPPED (no) [100%]\n", (1, 0, 1), []),
    ("[gw0] [ 50%] PASSED tests/a.py::test_b \n[gw1] [100%] FAILED tests/a.py::test_c \n"
     "FAILED tests/a.py::test_c - assert\n", (1, 1, 0), ["tests/a.py::test_c"]),
    ("[gw0] [ 50%] PASSED tests/a.py::test_b[x - y] \n[gw1] [100%] FAILED tests/a.py::test_b[x - z] \n"
     "FAILED tests/a.py::test_b[x - z] - assert 1\n", (1, 1, 0), ["tests/a.py::test_b[x - z]"]),
    ("", (0, 0, 0), []),
])  # fmt: skip
def test_tests_are_counted_as_far_as_they_came(said, counts, failed):
    found = script("gpu").tests(said)
    assert tuple(found["tests"][key] for key in ("passed", "failed", "skipped")) == counts
    assert found["failed"] == failed


def test_the_runs_on_a_gpu_have_settings_that_exist(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAFRUGAL_MIRRORS", str(tmp_path))
    arms, memory, harness = script("arms"), script("device_memory"), script("harness")
    here = {"device": "cuda", "cache": tmp_path, "set": arms.text()}
    names = arms.arms("c4_60m")
    assert len(names) == 8
    for name in names:
        chosen = compose.settings(arms.words(name, Namespace(table="c4_60m", steps=15, **here)))
        assert chosen.data.source == str(tmp_path / "c4")
        assert chosen.trainer.batch_size == chosen.trainer.micro_batch_size  # else there are no CUDA graphs
    for words in [*memory.cases("cuda", False).values(), *memory.cases("cuda", True).values()]:
        assert compose.settings(list(words)).trainer.precision == "bf16"
    shape = Namespace(model="llama_60m", batch=128, length=256, precision="bf16", rounds=6, steps=20, **here)
    assert harness.settings(shape, "frugal").model.hidden_size == 512


def test_the_page_says_of_each_stage_what_it_is_limited_to():
    text = (REPOSITORY / "docs" / "gpu.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| .*? \| (\d+) s \|$", text, re.MULTILINE))
    assert rows == {stage.name: f"{stage.limit:.0f}" for stage in script("gpu").stages("cuda", Path("cache"))}


def test_make_takes_python_as_it_is_and_writes_where_it_is_told_to():
    def typed(*words):
        return subprocess.run(["make", "--dry-run", *words], capture_output=True, text=True, cwd=REPOSITORY).stdout

    assert "mypython experiments/benchmarks/gpu.py --out gpu-results" in typed("gpu", "PYTHON=mypython")
    assert "gpu.py --out elsewhere --device cpu" in typed("gpu", "OUT=elsewhere", "ARGS=--device cpu")
    assert "venv" not in typed("gpu", "PYTHON=mypython")
    assert "--pages experiments/results\n" in typed("tables")
