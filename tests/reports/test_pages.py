"""Pages of tables, to the byte; the committed ones are made of the committed records."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import REPOSITORY
from made import recorded, section

from adafrugal.reports import gpu, layouts, pages, plan, records
from adafrugal.reports.arms import jobs
from adafrugal.system.errors import SettingError

GOLDEN = Path(__file__).parent / "golden"
TABLES = """\
place: 1
title: A page
about: What it is about.
commands: [sweeps=c4_60m]
sections:
  - name: main
    title: Main
    commands:
      - -m experiments=c4_60m/adamw,c4_60m/frugal,c4_60m/adafrugal,c4_60m/galore seed=0,1 scale=mini data=embedded
    note: A note.
    decisions: [adamw]
    published: [frugal_c4/60M, galore_c4/60M]
    pictures: [frontier, tradeoff, loss, controls, state, time]
    claims: [A1, A2]
  - name: search
    title: Search
    kind: search
    commands:
      - -m experiments=c4_60m/frugal optimizer.lr=1e-2,2e-2 optimizer.split_lr_scale=0.1,0.05 scale=mini data=embedded
      - -m experiments=c4_60m/frugal optimizer.lr=4e-2 optimizer.split_lr_scale=0.1 scale=mini data=embedded
  - name: nothing
    title: Nothing yet
    commands: [sweeps=c4_60m]
    claims: [F1]
"""


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """The page of `TABLES`, without runs."""
    tables = tmp_path_factory.mktemp("tables")
    (tables / "page.yaml").write_text(TABLES)
    return plan.pages(tables)


def written(planned, root, out):
    """Write pages filled with the runs below `root`."""
    return pages.write(plan.filled(planned, records.find([root])), out)


@pytest.fixture(scope="module")
def made(planned, tmp_path_factory):
    """A directory with a page's files, made of a few records."""
    made = tmp_path_factory.mktemp("results")
    base, root = "scale=mini data=embedded", made / "records"
    for seed in (0, 1):
        recorded(root, f"experiments=c4_60m/adamw {base}", 4.50 + seed / 10, seed, state=(4, 4))
        recorded(root, f"experiments=c4_60m/frugal {base}", 4.52 + seed / 8, seed)
    recorded(root, f"experiments=c4_60m/adafrugal {base}", 4.55, 0, state=(3, 1))
    for lr, s, loss in (("1e-2", "0.1", 5.0), ("2e-2", "0.1", 4.75), ("1e-2", "0.05", 4.9), ("4e-2", "0.1", 4.8)):
        recorded(root, f"experiments=c4_60m/frugal {base} optimizer.lr={lr} optimizer.split_lr_scale={s}", loss)
    written(planned, root, made)
    return made


def test_a_page_is_what_it_was(made):
    """Where a change is wanted: copy the new files over those in golden/, and read the difference."""
    files = sorted(file.relative_to(made) for file in made.rglob("*") if file.suffix in (".md", ".csv", ".tex"))
    assert files == sorted(file.relative_to(GOLDEN) for file in GOLDEN.rglob("*") if file.is_file())
    for file in files:
        assert (made / file).read_text() == (GOLDEN / file).read_text(), file


def test_links_lead_to_runs_and_to_their_archive(planned, made, tmp_path):
    def links(page):
        return [part.split("](")[1].split(")")[0] for part in page.read_text().split("[seed ")[1:]]

    plain = links(made / "page" / "README.md")
    assert len(plain) == 9
    assert all((made / "page" / link / "summary.json").exists() for link in plain)
    shutil.copytree(made / "records", tmp_path / "records")
    archive = records.pack(tmp_path / "records")
    shutil.rmtree(tmp_path / "records")
    written(planned, tmp_path, tmp_path)
    packed = links(tmp_path / "page" / "README.md")
    assert packed == [link.replace("records/", "records.tar.xz#") for link in plain]
    assert {link.partition("#")[2] for link in packed} <= {run.name for run in records.read(archive)}
    for file in (tmp_path / "page").iterdir():
        if file.suffix != ".md":  # pictures, too, are the same to the byte
            assert file.read_bytes() == (made / "page" / file.name).read_bytes(), file
    assert b"<dc:date>" not in (tmp_path / "page" / "main-loss.svg").read_bytes()


@pytest.mark.parametrize(("right", "wrong", "message"), [
    ("[A1, A2]", "[A1, B2]", "page.yaml, section main: claims has no 'B2'; .*allowed: F1, F2"),
    ("tradeoff", "tradeof", "pictures has no 'tradeof'; did you mean tradeoff"),
    ("frugal_c4/60M", "frugal_c4/61M", "published has no 'frugal_c4/61M'; did you mean frugal_c4/60M"),
    ("kind: search", "kind: serch", "section search: kind has no 'serch'; did you mean search"),
    ("decisions: [adamw]", "columns: [loss, stat]", "columns has no 'stat'; did you mean state?.*allowed: n, diff"),
    ("decisions: [adamw]", "arm: [adamw]", "page.yaml, section main: arm: .*did you mean arms"),
    ("decisions: [adamw]", "rates: {of: rates/embedded}", "rates has no 'of'; .*allowed: from"),
    ("decisions: [adamw]", "decisions: [adamw]\n    best_of: optimizer.lr", "best_of and decisions: a decision takes"),
    ("kind: search", "kind: search\n    best_of: optimizer.lr", "best_of is of kind comparison, not search"),
])  # fmt: skip
def test_unknown_names_in_a_page_are_refused_before_anything_is_composed(tmp_path, monkeypatch, right, wrong, message):
    monkeypatch.setattr(plan, "jobs", None)
    (tmp_path / "page.yaml").write_text(TABLES.replace(right, wrong))
    with pytest.raises(SettingError, match=message):
        plan.page(tmp_path / "page.yaml")


def test_a_place_that_cannot_be_written_to_is_named(planned, made, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingError, match=r"file.*choose a directory that can be written to"):
        written(planned, made, tmp_path / "file")


def test_a_published_value_that_compares_has_a_difference(planned, made, tmp_path, monkeypatch):
    values = "{adamw: 20.0, frugal: null, galore: 30.0}"
    text = f"source: nowhere\ntitle: published\ncomparable: true\nperplexity: {{60M: {values}}}\n"
    (tmp_path / "paper.yaml").write_text(text)
    monkeypatch.setattr(layouts, "PUBLISHED", tmp_path)
    section = replace(plan.filled(planned, records.find([made]))[0].sections[0], published=["paper/60M"])
    rows = {row[0]: row[-2:] for row in layouts.grids(section)[""].rows}
    mean = (2.0**4.5 + 2.0**4.6) / 2
    assert rows["adamw"] == ["20.0", f"{mean - 20:+.2f}"]
    assert rows["frugal"] == ["not published here", "–"]
    assert rows["galore"] == ["30.0", "missing"]


def test_the_command_writes_pages_without_torch(made, tmp_path):
    (tmp_path / "page.yaml").write_text(TABLES)
    script = (
        "import pathlib, sys; from adafrugal.reports import __main__ as command, plan; "
        f"plan.pages.__defaults__ = (pathlib.Path({str(tmp_path)!r}),); "
        "assert command.main() == 0 and 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", script, str(made), "--pages", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 pages in" in done.stdout and "with 9 of 9 runs" in done.stdout


def test_the_committed_pages_are_made_of_the_committed_records(tmp_path):
    """In a copy, `make tables` gives the same files to the byte."""
    results, copy = REPOSITORY / "experiments" / "results", tmp_path / "experiments" / "results"
    shutil.copytree(results, copy)
    made = plan.filled(plan.pages(), records.find([copy]))
    assert [page.file.place for page in made] == list(range(1, len(made) + 1))
    for page in made:
        assert set(page.file.commands) <= {command for section in page.sections for command in section.commands}
    committed = [file for page in made for file in (copy / page.name).glob("*.*") if file.suffix != ".xz"]
    committed += [copy / "README.md", copy / "gpu" / "README.md"]
    for file in committed:
        file.unlink()
    assert sorted(pages.write(made, copy, gpu.find([copy]))) == sorted(committed)
    for file in committed:
        assert file.read_bytes() == (results / file.relative_to(copy)).read_bytes(), file


def test_runs_that_diverged_beside_others_are_named_below_the_table(tmp_path):
    command = "experiments=c4_60m/adamw scale=mini data=embedded"
    for seed in range(4):
        run = recorded(tmp_path / "runs", command, 4.5, seed)
        if seed in (1, 2):
            run.set_status("failed", reason="TrainingError: the training loss is nan at step 20")
    made = section(jobs([f"-m {command} seed=0,1,2,3"]), tmp_path / "runs")
    pages.write([plan.Page("page", plan.PageFile(1, "A page", "About."), [made])], tmp_path / "out")
    text = (tmp_path / "out" / "page" / "README.md").read_text()
    assert "| adamw | 2 |" in text
    assert "Diverged, and in no mean: adamw (seeds 1, 2)." in text
