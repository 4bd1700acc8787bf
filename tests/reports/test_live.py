"""The page of runs that go on: what it reads of growing records, and what a browser makes of it."""

import functools
import html
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from made import recorded

from adafrugal.reports import __main__ as command
from adafrugal.reports import follow, live
from adafrugal.tracking.record import Record

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
LINE = {"loss": 5.0, "seconds": {"wall": 2.0}, "density": 0.2, "interval": 25, "state_bytes": 2**21,
        "memory": {"resident": 2**28}, "tokens_per_second": 1234.5, "tokens": 80}  # fmt: skip


@pytest.fixture
def root(tmp_path):
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


def begun(root, name="adamw-0123456789", **differs):
    """The record of a run that has just begun."""
    record = Record(root / "pretrain-embedded-llama_3m" / name)
    record.begin({})
    labels = {"task": "pretrain", "arm": name.partition("-")[0], "seed": 0}
    record.write_environment({"identity": {"labels": labels, "differs": differs}})
    record.set_status("running")
    return record


def add(record, *steps, **more):
    for step in steps:
        record.add_metrics({"step": step, **LINE, **more})


def row_of(page, name):
    """The text of a run's row, its cells apart."""
    (row,) = re.findall(rf'<tr id="[^"]+" data-name="{name}.*?</tr>', page, re.DOTALL)
    return [html.unescape(" ".join(re.sub(r"<[^>]+>", " ", cell).split())) for cell in row.split("</td>")]


def page_of(root):
    return live.Page(0.0).of(follow.Runs([root]).update())


def test_a_row_has_the_numbers_of_the_last_line_and_of_the_last_evaluation(root):
    record = begun(root, **{"trainer.steps": 400})
    add(record, 100, validation_loss=5.25, elapsed=30.0)
    add(record, 200, elapsed=60.0)
    sign = (record.directory / "metrics.jsonl").stat().st_mtime
    assert row_of(page_of(root), "adamw")[:-2] == [
        "", "adamw-0123456789 runs/pretrain-embedded-llama_3m", "running", "200/400", "5.0000", "5.2500", "0.200",
        "25", "2.0", "256", "1,234", "1:00 1:00 left", time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(sign)),
    ]  # fmt: skip


def test_a_run_is_read_on_from_where_its_last_line_ended(root, monkeypatch):
    record, runs, read = begun(root), follow.Runs([root]), []
    metrics_from = Record.metrics_from
    monkeypatch.setattr(Record, "metrics_from", lambda self, at, _: read.append(at) or metrics_from(self, at, _))
    add(record, 10, 20)
    (run,) = runs.update()
    with (record.directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "lo')  # the rest is on its way
    assert [runs.update()[0].line["step"] for _ in range(2)] == [20, 20]
    with (record.directory / "metrics.jsonl").open("a") as file:
        file.write('ss": 4.5, "seconds": {"wall": 1.0}}\n')
    assert runs.update() == [run], "the same one, longer"
    assert run.loss.points == [(10, 5.0), (20, 5.0), (30, 4.5)]
    assert run.seconds == 5.0, "older records have no `elapsed`"
    whole = len((record.directory / "metrics.jsonl").read_bytes().splitlines(True)[0]) * 2
    assert read == [0, whole, whole], "never from the start again, and not at all where nothing changed"


def test_a_resumed_run_that_goes_back_to_its_checkpoint_shows_each_step_once(root):
    record, runs = begun(root), follow.Runs([root])
    add(record, 10, 20, 30)
    runs.update()
    record.go_back_to(20)
    add(record, 30, 40, loss=4.0)
    (run,) = runs.update()
    assert run.loss.points == [(10, 5.0), (20, 5.0), (30, 4.0), (40, 4.0)]


def test_the_page_of_a_run_that_went_on_is_that_of_one_read_anew(root):
    record, other, runs, page = begun(root), begun(root, "frugal-0"), follow.Runs([root]), live.Page(0.0)
    page.of(runs.update())
    add(record, 10, 20)
    begun(root, "adamw-1", seed=1)
    add(other, 10)
    record.set_status("interrupted")
    kept, anew = (re.findall(r"<tr id=.*?</tr>", found) for found in (page.of(runs.update()), page_of(root)))
    assert kept == anew
    assert len(kept) == 3


def test_a_removed_run_is_gone_and_a_new_one_is_found(root):
    record, runs = begun(root), follow.Runs([root])
    assert len(runs.update()) == 1
    shutil.rmtree(record.directory)
    begun(root, "frugal-0123456789")
    assert [run.labels["arm"] for run in runs.update()] == ["frugal"]


@pytest.mark.parametrize(("age", "status"), [(30, "running"), (90, "silent")])
def test_a_run_that_has_not_written_for_long_is_silent(root, age, status):
    """Ten times the seconds of its last line, and a minute at least."""
    record = begun(root)
    add(record, 10)
    for file in record.directory.iterdir():
        os.utime(file, (time.time() - age,) * 2)
    assert follow.Runs([root]).update()[0].status == status
    add(record, 20, seconds={"wall": 60.0})
    for file in record.directory.iterdir():
        os.utime(file, (time.time() - age,) * 2)
    assert follow.Runs([root]).update()[0].status == "running", "a line of this run takes a minute"


@pytest.mark.parametrize(("name", "text"), [
    ("environment.json", "{"), ("environment.json", "[]"), ("environment.json", '{"identity": 3}'),
    ("status.json", '{"sta'), ("status.json", "3"), ("metrics.jsonl", "\0\0\n"), ("metrics.jsonl", "[1, 2]\n"),
    ("metrics.jsonl", '{"step": 1, "loss": "high"}\n'), ("metrics.jsonl", b"\xff\xfe\n"),
])  # fmt: skip
def test_a_damaged_file_is_named_and_the_other_runs_are_there(root, name, text):
    record = begun(root)
    add(begun(root, "frugal-0123456789"), 10)
    (record.directory / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    page = page_of(root)
    row = row_of(page, "adamw")
    assert row[2] == "damaged"
    assert name in row[1]
    assert row_of(page, "frugal")[2] == "running"


@pytest.mark.parametrize("damage", [b"\0\0\n", b'{"step": 20, "lo\n', b'{"step": 20, "loss": "high"}\n', b"[]\n"])
def test_the_lines_after_a_damaged_one_are_read(root, damage):
    record, runs, page = begun(root), follow.Runs([root]), live.Page(0.0)
    add(record, 10)
    with (record.directory / "metrics.jsonl").open("ab") as file:
        file.write(damage)
    for step in (30, 40):
        add(record, step, loss=4.0)
        row = row_of(page.of(runs.update()), "adamw")
        assert row[2] == "damaged" and "metrics.jsonl" in row[1]
        assert row[3:5] == [f"{step}/500", "4.0000"]
    record.write_metrics([{"step": 10, **LINE}])
    assert row_of(page.of(runs.update()), "adamw")[2:5] == ["running", "10/500", "5.0000"], "mended"


def test_losses_that_are_no_numbers_are_shown_and_not_drawn(root):
    record = begun(root)
    add(record, 10)
    add(record, 20, loss=math.nan, density=None, interval=None)
    record.set_status("failed", reason="the loss is nan at step 20")
    row = row_of(page_of(root), "adamw")
    assert row[1].endswith("the loss is nan at step 20")
    assert row[2:5] == ["failed", "20/500", "nan"]
    assert row[6:8] == ["", ""], "ρ and T"
    assert "nan," not in page_of(root)


def test_all_text_is_escaped(root):
    bad = "<script>alert('&\"')</script>"
    record = begun(root, "a<b>'\"&", **{"data.source": bad})
    begun(root, "a<b>'\"&2")
    record.set_status("failed", reason=bad)
    page = page_of(root)
    assert bad not in page
    assert "<b>'" not in page
    assert page.count("<script>") == 1
    assert html.escape(bad) in page


def test_a_status_that_no_run_has_is_damage(root):
    record = begun(root)
    (record.directory / "status.json").write_text(json.dumps({"status": "<script>alert(1)</script>"}))
    page = page_of(root)
    assert "<script>alert" not in page
    assert "1 damaged" in page


@pytest.mark.parametrize(
    "odd",
    [
        {"validation_loss": None}, {"memory": []}, {"elapsed": math.nan}, {"state_bytes": "many"},
        {"interval": math.inf}, {"density": "low"}, {"tokens_per_second": {}},
    ],
)  # fmt: skip
def test_an_odd_line_does_not_end_the_page(root, odd):
    begun(root, "frugal-1")
    add(Record(root / "pretrain-embedded-llama_3m" / "frugal-1"), 10)
    add(begun(root), 10, **odd)
    runs, page = follow.Runs([root]), live.Page(0.0)
    for _ in range(2):
        text = page.of(runs.update())
        assert row_of(text, "frugal-1")[4] == "5.0000"
        assert row_of(text, "adamw-0123456789")


@pytest.mark.parametrize(
    "identity",
    [
        {"labels": {"arm": []}, "differs": {}}, {"labels": {}, "differs": "lr"}, {"labels": 3, "differs": {}},
        {"labels": {}, "differs": {"trainer.steps": "many"}},
    ],
)  # fmt: skip
def test_an_odd_identity_does_not_end_the_page(root, identity):
    record = begun(root)
    record.write_environment({"identity": identity})
    add(record, 10, interval=200.0)
    assert row_of(page_of(root), "adamw-0123456789")[7] == "200"


def test_runs_of_an_arm_are_told_apart_by_what_differs(root):
    for seed, lr in ((0, 0.001), (1, 0.001), (0, 0.003)):
        begun(root, f"adamw-{seed}{lr}", **{"seed": seed, "optimizer.lr": lr, "optimizer.kind": "adamw"})
    begun(root, "frugal-1", **{"optimizer.lr": 1.0})
    runs = follow.Runs([root]).update()
    assert sorted(follow.apart(runs).values()) == ["", "lr=0.001 seed=0", "lr=0.001 seed=1", "lr=0.003 seed=0"]


def test_a_long_curve_is_thinned_and_ends_at_its_last_point():
    curve = follow.Curve()
    for step in range(1, 10_001):
        curve.add(step, 1.0)
    steps = [step for step, _ in curve.points]
    assert 100 < len(steps) < 260
    assert (steps[0], steps[-1]) == (1, 10_000)
    assert {b - a for a, b in itertools.pairwise(steps[:-1])} == {64}


def test_once_writes_the_page_of_real_records_and_nothing_else(root, monkeypatch, capsys):
    for arm in ("adamw", "frugal", "adafrugal"):
        recorded(root, f"experiments=c4_60m/{arm} scale=mini data=embedded")
    before = {*root.rglob("*")}
    monkeypatch.setattr(sys, "argv", ["reports", "--once", str(root)])
    assert command.main() == 0
    assert capsys.readouterr().out == f"3 runs → {root / 'index.html'}\n"
    assert {*root.rglob("*")} - before == {root / "index.html"}
    page = (root / "index.html").read_text()
    assert "3 finished" in page
    assert row_of(page, "adafrugal")[5] == "4.5000"
    assert not re.search(r"""(src|href)=["'](?!data:)|https?://(?!www\.w3\.org/2000/svg)""", page), "it is one file"


@pytest.mark.parametrize("named", ["nowhere", "a_file"])
def test_a_root_that_is_none_is_refused(tmp_path, monkeypatch, capsys, named):
    (tmp_path / "a_file").touch()
    monkeypatch.setattr(sys, "argv", ["reports", "--watch", str(tmp_path / named)])
    assert command.main() == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / named} is no directory; name one with runs below")


def test_watch_follows_until_ctrl_c(root):
    words = [sys.executable, "-m", "adafrugal.reports", "--watch", str(root)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # a shell's background job, as these tests may be, ignores SIGINT
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(words, **pipes, preexec_fn=heed)
    page, until = root / "index.html", time.monotonic() + 60

    def wait_for(text):
        while not (page.exists() and text in page.read_text()):
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.05)

    wait_for("no runs yet")
    add(begun(root), 10)
    wait_for("1 running")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")
    assert out == f"0 runs → {page}; open it in a browser, Ctrl-C ends\n\n"


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium to look at the page with")
def test_a_browser_sorts_filters_and_compares_and_keeps_all_three(root, tmp_path):
    """It presses what a person would press, then reads the address and what is on the page."""
    for arm, loss in (("adamw", 5.0), ("frugal", 4.0), ("adafrugal", 4.5)):
        add(begun(root, f"{arm}-0"), 10, 20, loss=loss, validation_loss=loss)
    begun(root, "muon-0")
    press = """
      const head = key => document.querySelector(`th[data-key=${key}] button`);
      const box = document.querySelector("input"), all = () => [...document.querySelectorAll("tbody tr")];
      const rows = () => all().filter(row => !row.hidden).map(row => row.dataset.name);
      const seen = {start: [location.hash, rows()]};
      head("loss").click(); seen.up = rows(); head("loss").click(); seen.down = rows();
      for (const row of document.querySelectorAll("tbody tr")) {
        if (/frugal/.test(row.dataset.name)) row.querySelector("input").click();
      }
      box.value = "frugal RUNNING"; box.dispatchEvent(new Event("input")); seen.filtered = rows();
      seen.lines = document.querySelectorAll("#compare polyline").length; seen.hash = location.hash;
      seen.signs = [...document.querySelectorAll(".sign")].every(cell => /^\\d+ s$/.test(cell.textContent));
      seen.wide = document.documentElement.scrollWidth <= innerWidth;
      document.body.dataset.seen = JSON.stringify(seen);
    """
    page = page_of(root).replace("</body>", f"<script>{{{press}}}</script></body>")
    (root / "page.html").write_text(page)

    def look(address):
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
                 "--disable-background-networking", "--disable-component-update", "--window-size=1280,900"]  # fmt: skip
        found = subprocess.run(
            [BROWSER, *flags, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"file://{address}"],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        return json.loads(html.unescape(re.search(r'data-seen="([^"]*)"', found.stdout)[1]))

    seen = look(root / "page.html")
    assert seen["up"] == ["frugal-0", "adafrugal-0", "adamw-0", "muon-0"]
    assert seen["down"] == ["adamw-0", "adafrugal-0", "frugal-0", "muon-0"], "what has no number is last both ways"
    assert seen["filtered"] == ["adafrugal-0", "frugal-0"]
    assert seen["lines"] == 2
    assert seen["signs"]
    assert seen["wide"], "nothing is wider than the window"
    again = look(f"{root / 'page.html'}{seen['hash']}")
    assert again["start"] == [seen["hash"], ["adafrugal-0", "frugal-0"]]
