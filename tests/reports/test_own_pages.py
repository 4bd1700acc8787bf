"""A table of one's own: the three commands of experiments/tables/README.md, its keys, and what a page may name."""

import csv
import re
import shlex
import subprocess
import sys
from dataclasses import MISSING, fields

import pytest
from conftest import REPOSITORY
from made import recorded

from adafrugal.reports import layouts, page_file, pages, pictures, plan, records
from adafrugal.reports.cells import COLUMNS
from adafrugal.system.errors import SettingError

DOCS = (REPOSITORY / "experiments" / "tables" / "README.md").read_text()
(EXAMPLE,) = re.findall(r"```yaml\ntitle.*?```", DOCS, re.DOTALL)
(COMMANDS,) = re.findall(r"```bash\n(.*?)```", DOCS, re.DOTALL)
GRID = "-m experiments=c4_60m/adamw,c4_60m/frugal optimizer.lr=1e-3,1e-2,1e-1 seed=0,1 scale=mini data=embedded"
ONE = GRID.replace("1e-3,1e-2,1e-1", "1e-2")
LOSSES = {"adamw": {1e-3: 4.8, 1e-2: 4.5, 1e-1: 5.0}, "frugal": {1e-3: 4.7, 1e-2: 4.6, 1e-1: 4.4}}


def keys(heading):
    """The keys of a section's table."""
    return re.findall(r"^\| `(\w+)` \|", DOCS.split(f"## {heading}\n")[1].split("\n## ")[0], re.MULTILINE)


@pytest.mark.parametrize(("heading", "kind"), [
    ("Keys of a page", page_file.PageFile), ("Keys of a section", page_file.SectionFile)
])  # fmt: skip
def test_every_key_is_documented(heading, kind):
    assert sorted(keys(heading)) == sorted(field.name for field in fields(kind))


def test_every_name_that_a_key_takes_is_documented():
    text = DOCS.split("## Keys of a section\n")[1].split("\n## ")[0]
    for name in (*COLUMNS, "n", "difference", *layouts.KINDS, *pictures.DRAWN):
        assert f"`{name}`" in text, name
    usual = next(field for field in fields(page_file.SectionFile) if field.name == "columns").default_factory()
    assert f"`[{', '.join(usual)}]`" in text
    assert all(field.default is MISSING or isinstance(field.default, str | int) or field.default is None
               for field in fields(page_file.PageFile))  # fmt: skip


def test_the_three_commands_make_a_table_of_ones_own(train, tmp_path):
    """With a smaller grid, and runs of four steps on a text of a few words."""
    lines = EXAMPLE.splitlines()[1:-1]
    assert len(lines) <= 20
    (tmp_path / "my_text").mkdir()
    words = [f"w{n * n % 1009}" for n in range(16000)]
    paragraphs = (" ".join(words[n : n + 80]) for n in range(0, len(words), 80))
    (tmp_path / "my_text" / "one.txt").write_text("\n\n".join(paragraphs))
    small = f"scale=smoke tracking=local trainer.steps=4 run_root={tmp_path / 'runs'}"

    def smaller(text):
        return re.sub("3e-3,1e-2,3e-2(.*my_text)", rf"3e-3,3e-2\1 {small}", text)

    (tmp_path / "mine.yaml").write_text(smaller("\n".join(lines)))
    check, make, show = (smaller(re.split(r" +# ", line)[0]) for line in COMMANDS.strip().splitlines())
    assert check == show == "python -m adafrugal.reports --page mine.yaml"

    def run(command):
        words = [sys.executable, *shlex.split(command)[1:]]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert f": 0 of 12 runs\n    {make}\n" in run(check)
    assert make.startswith("python train.py ")
    made = train(*shlex.split(make)[2:], scale=None, tracking=None)
    assert made.returncode == 0, made.stderr
    assert ": 12 of 12 runs\n" in run(show)
    memories = [run.summary()["memory"] for run in records.find([tmp_path / "runs"])]
    assert [memory["alone"] for memory in memories].count(True) == 1 == sum("grown" in memory for memory in memories)
    out = tmp_path / "tables" / "mine"
    page = (out / "README.md").read_text()
    for arm in ("AdamW", "GaLore", "AdaFRUGAL (ours)"):
        assert re.search(rf"^\| {re.escape(arm)} \| 2 \| \d+\.\d{{4}} ± ", page, re.MULTILINE), arm
    assert "| arm | lr 0.003 | lr 0.03 | at an edge |" in page
    assert "Not searched: AdamW: β 0.9, 0.999, weight decay 0, s 1; " in page
    assert "β 0.9, 0.999, weight decay 0, s 1, c 1." in page
    assert "12 runs: code " in page
    tex = (out / "table.tex").read_text()
    assert r"\toprule" in tex and "AdaFRUGAL (ours) & 2 & " in tex
    rows = list(csv.DictReader((out / "table.csv").open()))
    assert [row["arm"] for row in rows] == ["AdamW", "GaLore", "AdaFRUGAL (ours)"]
    assert all(float(row["validation loss"]) > 0 and float(row["seconds without evaluations"]) > 0 for row in rows)
    assert float(rows[2]["− AdamW, 95%"]) == pytest.approx(
        float(rows[2]["validation loss"]) - float(rows[0]["validation loss"])
    )
    for picture in ("loss", "validation"):
        assert "AdaFRUGAL (ours), lr 0.03, 2 seeds" in (out / f"table-{picture}.svg").read_text()


def test_pages_of_ones_own_are_written_where_git_ignores_them():
    assert "experiments/results,tables)\n" in (REPOSITORY / "Makefile").read_text()
    assert "/tables/" in (REPOSITORY / ".gitignore").read_text().splitlines()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Records of the grid: AdamW's best is inside it, FRUGAL's at its upper edge."""
    root = tmp_path_factory.mktemp("runs")
    for arm, by_lr in LOSSES.items():
        for lr, loss in by_lr.items():
            for seed in (0, 1):
                words = f"experiments=c4_60m/{arm} optimizer.lr={lr} scale=mini data=embedded"
                recorded(root, words, loss + seed / 10, seed)
    return root


@pytest.fixture
def made(root, tmp_path):
    """A function: the text of a page's sections -> the page, filled with the records of the grid."""

    def fill(text):
        (tmp_path / "mine.yaml").write_text(f"sections:\n{text}")
        return plan.filled([plan.page(tmp_path / "mine.yaml")], records.find([root]))[0]

    return fill


def cells(grid):
    """First cell of a row -> the others as text."""
    return {row[0]: [getattr(cell, "text", cell) for cell in row[1:]] for row in grid.rows}


def test_each_arm_is_at_the_best_of_a_grid_and_an_edge_is_said(made):
    (section,) = made(f"""\
  - commands: ["{GRID}"]
    best_of: optimizer.lr
    arms: {{frugal: FRUGAL, adamw: null}}
    columns: [loss, n]
""").sections
    first, second = layouts.grids(section).values()
    assert first.head == ["arm", "validation loss", "n"]
    assert cells(first) == {"FRUGAL": ["4.4500 ± 0.0707", "2"], "adamw": ["4.5500 ± 0.0707", "2"]}
    assert second.head == ["arm", "lr 0.001", "lr 0.01", "lr 0.1", "at an edge"]
    assert [row[-1] for row in second.rows] == ["lr", "no"]
    assert [cell.is_best for cell in second.rows[0][1:4]] == [False, False, True]
    (rule, fixed) = layouts.rules(section)
    assert "(FRUGAL: lr 0.1, adamw: lr 0.01)" in rule and rule.endswith("what was tried: FRUGAL (lr).")
    usual = "β 0.9, 0.999, weight decay 0"
    assert fixed == f"Not searched: FRUGAL: {usual}, s 0.015625, c 1; the others: {usual}, s 0.03125."


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_a_rate_of_which_a_seed_is_missing_or_diverged_is_not_the_best(made, tmp_path, seeds):
    for seed in seeds:
        run = recorded(tmp_path / "more", "experiments=c4_60m/adamw optimizer.lr=1 scale=mini data=embedded", 1.0, seed)
        if len(seeds) == 2:
            run.set_status("failed", reason="TrainingError: the training loss is nan at step 20")
    found = made(f'  - {{commands: ["{GRID.replace("1e-1", "1e-1,1")}"], best_of: optimizer.lr}}\n').sections[0].runs
    page = plan.page(tmp_path / "mine.yaml")
    (section,) = plan.filled([page], [*found, *records.find([tmp_path / "more"])])[0].sections
    assert section.rows["adamw"].rates["optimizer.lr"] == 0.01
    (adamw, _) = cells(layouts.grids(section)["Everything that was tried, by its validation loss:"]).values()
    assert adamw[3:] == [{1: "1.0000", 2: "diverged"}[len(seeds)], "no"]


@pytest.mark.parametrize("files", ["", "/*.txt"])
def test_runs_of_another_text_are_not_taken_for_those_of_the_text_that_is_named(files, tmp_path):
    words = "optimizer=adamw data=text tracking=local"
    page = tmp_path / "mine.yaml"
    page.write_text(f"sections: [{{commands: ['-m {words} data.source=b/other{files} seed=0,1']}}]\n")

    def section():
        (found,) = plan.filled([plan.page(page)], records.find([tmp_path / "runs"]))[0].sections
        return sorted(found.jobs[0].runs), len(found.others)

    for seed in (0, 1):
        recorded(tmp_path / "runs", f"{words} data.source=a/mine{files}", seed=seed)
    assert section() == ([], 2)
    recorded(tmp_path / "runs", f"{words} data.source=elsewhere/other{files}", seed=0, data="1" * 64)
    assert section() == ([0], 2)  # a copy of the same name
    recorded(tmp_path / "runs", f"{words} data.source=b/other{files}", seed=1, data="2" * 64)
    assert section() == ([1], 3)  # the very source


def test_records_that_do_not_exist_leave_the_page_as_it_is(tmp_path):
    page = tmp_path / "mine.yaml"
    page.write_text("sections: [{commands: [optimizer=adamw seed=0]}]\n")
    command = [sys.executable, "-m", "adafrugal.reports", "nosuch", "--page", page, "--pages", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: nosuch does not exist; name a directory or an archive of runs, or leave it out\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ('optimizer=adamw scale="smoke', r"a quote is not closed in 'optimizer"),
        ("python train.py -m seed=0,1", r"'python train.py -m seed=0,1' names train.py; allowed: the words after it"),
    ],
)
def test_what_is_no_command_is_one_line(command, message, tmp_path):
    page = tmp_path / "mine.yaml"
    page.write_text(f"sections: [{{commands: ['{command}']}}]\n")
    with pytest.raises(SettingError, match=rf"mine.yaml, section table: commands: {message}"):
        plan.page(page)


def test_rows_can_have_two_references(made):
    (section,) = made(f'  - {{commands: ["{ONE}"], reference: [adamw, frugal]}}\n').sections
    grid = layouts.grids(section)[""]
    assert grid.head[3:5] == ["− adamw, 95%", "− frugal, 95%"]
    assert cells(grid)["frugal"][2].startswith("+0.1000 [") and cells(grid)["frugal"][3] == "–"
    assert cells(grid)["adamw"][2] == "–" and cells(grid)["adamw"][3].startswith("−0.1000 [")


TWO = f"""\
  - {{name: grid, commands: ["{GRID}"], best_of: optimizer.lr}}
  - name: fresh
    commands: ["-m experiments=c4_60m/adamw,c4_60m/frugal seed=1,10 scale=mini data=embedded"]
    rates: {{from: grid}}
"""


def test_a_section_takes_the_rates_that_another_found_and_prints_them(made, tmp_path):
    page = made(TWO)
    fresh = page.sections[1]
    assert [job.rates["optimizer.lr"] for job in fresh.jobs] == [0.01, 0.1]
    assert [list(job.runs) for job in fresh.jobs] == [[1], [1]]
    pages.write_one(page, tmp_path)
    written = (tmp_path / "mine" / "README.md").read_text()
    command = "python train.py -m seed=1,10 experiments=c4_60m/adamw scale=mini data=embedded optimizer.lr=0.01"
    assert f"    {command} " in written
    assert "Rates are the best of grid (adamw lr 0.01, s " in written
    assert "seeds 0, 1 chose them; 1 of these are in this table, too." in written
    assert not (tmp_path / "README.md").exists(), "the index of other pages is left alone"


def test_rates_that_are_not_found_yet_are_waited_for(made, tmp_path):
    (tmp_path / "mine.yaml").write_text(f"sections:\n{TWO}")
    page = plan.filled([plan.page(tmp_path / "mine.yaml")], [])[0]
    assert pages.missing(page.sections[1]) == "grid has no rates yet for adamw, frugal: make its runs first."
    assert page.sections[1].runs == []


def test_columns_of_two_sections_stand_side_by_side(made):
    page = made(f"""\
  - {{name: low, commands: ["{GRID.replace("1e-3,1e-2,1e-1", "1e-3")}"], arms: {{frugal: FRUGAL, adamw: AdamW}}}}
  - {{name: mid, commands: ["{ONE}"]}}
  - {{name: both, kind: side_by_side, columns: [low/loss, mid/difference, mid/seconds]}}
""")
    grid = layouts.grids(page.sections[2])[""]
    assert grid.head == ["arm", "low: validation loss", "mid: − adamw, 95%", "mid: seconds with evaluations"]
    assert cells(grid)["FRUGAL"][0] == "4.7500 ± 0.0707" and cells(grid)["FRUGAL"][1].startswith("+0.1000 [")
    assert cells(grid)["AdamW"] == ["4.8500 ± 0.0707", "–", "4.0 ± 0.0"]


@pytest.mark.parametrize(("rest", "message"), [
    ("best_of: optimizer.lr, arms: [adamw, frugl]", "arms has no 'frugl'; .*mean frugal"),
    ("best_of: optimizer.lrs", "best_of has no 'optimizer.lrs'; did you mean optimizer.lr"),
    ("best_of: lr", r"best_of has no 'lr'; did you mean optimizer.lr\? allowed"),
    ("columns: validation_loss", r"columns has no 'validation_loss'; did you mean loss\? allowed"),
    ("reference: null, rates: {from: embedded}", r"mine.yaml has no 'embedded'; did you mean \w+/embedded\?"),
    ("best_of: optimizer.lr, reference: galore", "reference is 'galore'; allowed: adamw"),
    ("reference: null, rates: {from: ratse/embedded}", "a page has no 'ratse'; .*mean rates"),
    ("reference: null, rates: {from: rates/papers}", "rates.yaml has no 'papers'; .*embedded"),
    ("reference: null, kind: side_by_side, columns: [other/loss]", "columns has no 'other/loss'"),
])  # fmt: skip
def test_names_that_the_commands_do_not_give_are_refused(made, rest, message):
    with pytest.raises(SettingError, match=message):
        made(f'  - {{commands: ["{GRID}"], {rest}}}\n')


def test_an_arm_for_which_a_search_has_no_rates_is_refused(made):
    with pytest.raises(SettingError, match=r"rates: grid has no 'lion'; .*allowed: adamw, frugal"):
        made(f"{TWO}  - {{name: lion, commands: [optimizer=lion], reference: null, rates: {{from: grid}}}}\n")


def test_a_page_that_is_no_page_is_refused_in_one_line(tmp_path):
    words = [sys.executable, "-m", "adafrugal.reports", "--page", "nothing.yaml"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: nothing\.yaml: No such file or directory; name a file .*\n", done.stderr)
    for given, message in (
        ("", "mine.yaml is empty; write a page such as"),
        ("# nothing\n", "mine.yaml is empty; write a page such as"),
        ("title: One\n", "there are no sections; allowed: a list of tables"),
        ("sections: []\n", "there are no sections; allowed: a list of tables"),
        ("sections: [{title: One}]\n", r"sections\[0\]\.commands is missing; write the words of train.py"),
        ("[1, 2]\n", "is a list; allowed: keys"),
        ("sections: {commands: [seed=0]}\n", r"sections is \{'comm.*; allowed: a list of tables"),
        ("sections: [{commands: [a]}, {commands: [b], bestof: x}]\n", r", sections\[1\]: bestof: .*mean best_of"),
        ("sections: [{name: two, commands: [], kinds: x}]\n", "mine.yaml, section two: kinds: there is no .*mean kind"),
        ("sections: [{name: two, commands: [], title: [1]}]\n", r", section two: title is \[1\]; allowed: text"),
        ("sections: [a]\n", r"sections is \['a'\]; allowed: a list of tables"),
    ):
        (tmp_path / "mine.yaml").write_text(given)
        with pytest.raises(SettingError, match=message):
            page_file.read(tmp_path / "mine.yaml")
