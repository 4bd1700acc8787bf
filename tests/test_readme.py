"""Every command, link, number and line of code in the README is true."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
import tomllib

import pytest
from conftest import REPOSITORY

from adafrugal import checks
from adafrugal.config import CHOICES, SUBSPACES
from adafrugal.reports import summary, table
from adafrugal.training.identity import identify

README = (REPOSITORY / "README.md").read_text()
COMMANDS = [
    line.partition("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
]
RECORDS = REPOSITORY / "experiments" / "results" / "embedded"


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python train.py")])
def test_every_training_command_composes(command, composed):
    typed = [part for part in shlex.split(command)[2:] if part not in ("-m", "--cfg", "job")]
    found, choices = composed(*(part if "{" in part else part.split(",")[0] for part in typed))
    checks.check(found, choices)


def test_every_other_command_is_there():
    others = {c for c in COMMANDS if not c.startswith("python train.py")}
    assert others == {
        "make train", "make test", "python -m adafrugal.reports", "python -m adafrugal.data data=c4 model=llama_60m"
    }  # fmt: skip
    assert (REPOSITORY / "src/adafrugal/reports/__main__.py").exists()
    done = subprocess.run(["make", "help"], capture_output=True, text=True, cwd=REPOSITORY, timeout=60)
    assert done.returncode == 0
    for target in ("train", "test", "lint", "clean"):
        assert f"make {target}" in done.stdout


def test_every_link_and_file_is_there():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert len(links) > 8
    for link in links:
        assert (REPOSITORY / link.partition("#")[0]).exists(), link


def test_every_choice_that_is_named_exists():
    rows = README[README.index("| `optimizer=` | what it is |") :].split("\n\n")[0].splitlines()[2:]
    choices = [name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])]
    for group, named in (("optimizer", choices), ("data", ["embedded", "c4", "vietvault", "text"])):
        files = {file.stem for file in (REPOSITORY / "conf" / group).glob("*.yaml")}
        assert files == set(named), f"the README's table of {group} has others"
    named = re.search(r"\| `model` \| (.*?) \|", README).group(1)
    files = {file.stem.removeprefix("llama_") for file in (REPOSITORY / "conf/model").glob("*.yaml")}
    assert files == {name.removeprefix("llama_") for name in re.findall(r"`([^`]+)`", named)}


def test_the_code_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "'moments':" in done.stdout


def test_the_table_is_made_from_the_committed_records():
    made = table.markdown(table.find([RECORDS]))
    assert made.split("\n\n")[1].strip() in README


def test_the_comparison_is_made_from_its_records_and_quotes_them():
    records = table.find([REPOSITORY / "experiments" / "results" / "comparison"])
    page = (REPOSITORY / "docs" / "comparison.md").read_text()
    assert table.markdown(records).split("\n\n", 1)[1].strip() in page
    measured = {f"{record.summary()['validation_loss']:.4f}" for record in records}
    quoted = set(re.findall(r"\b[1-9]\.\d{4}\b", page.split("All runs")[0]))
    assert len(quoted) > 8
    assert quoted <= measured


def test_the_output_is_that_of_a_committed_record():
    record = next(r for r in table.find([RECORDS]) if r.environment()["identity"]["labels"] == {
        "task": "pretrain", "data": "embedded", "model": "llama_3m", "arm": "adafrugal", "seed": 0
    })  # fmt: skip
    for line in summary.text(record).splitlines():
        if not line.startswith(("record", "picture")):
            assert line in README
    last = record.metrics()[-1]
    assert f"validation {last['validation_loss']:.4f}" in README


def test_committed_records_name_no_place_of_the_machine_they_were_made_on():
    for file in RECORDS.parent.rglob("*.*"):
        text = file.read_text()
        assert "run_root" not in text and "/tmp" not in text and "/home" not in text, file


def test_requirements_are_pinned_and_each_says_what_it_is_for():
    lines = (REPOSITORY / "requirements.txt").read_text().splitlines()
    assert lines[-1].startswith("-e .")
    for line in lines:
        assert re.fullmatch(r"([a-z0-9-]+==[0-9.]+|-e \.) +# .+", line), line
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11"


@pytest.mark.parametrize("page", sorted((REPOSITORY / "docs").glob("*.md")), ids=lambda page: page.name)
def test_every_link_of_the_other_pages_is_there(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not link.startswith(("http", "#")):
            assert (page.parent / link.partition("#")[0]).resolve().exists(), link


def test_the_page_on_the_optimizer_names_every_choice():
    page = (REPOSITORY / "docs" / "optimizer.md").read_text()
    files = (REPOSITORY / "conf" / "optimizer").rglob("*.yaml")
    names = [*SUBSPACES, *CHOICES["on_refresh"], *(file.stem for file in files if file.stem != "constant")]
    for name in names:
        assert f"`{name}`" in page, name


def script(name):
    """A script of experiments/benchmarks as a module."""
    path = REPOSITORY / "experiments" / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    benchmark = sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))
    spec.loader.exec_module(benchmark)
    return benchmark


def test_the_data_page_has_the_tables_of_its_records_and_its_benchmark():
    page = (REPOSITORY / "docs" / "data.md").read_text()
    results = REPOSITORY / "experiments" / "results"
    for part in table.markdown(table.find([results / "data"])).split("\n\n"):
        assert part.strip().removeprefix("## ") in page
    measured = json.loads((results / "benchmarks" / "data.json").read_text())["measured"]
    assert script("data").table(measured) in page


def test_the_commands_of_the_data_page_are_those_of_its_records(composed):
    page = (REPOSITORY / "docs" / "data.md").read_text()
    commands = [line.partition("#")[0].strip() for line in re.findall(r"```bash\n(.*?)```", page, re.S)[0].splitlines()]
    records = {r.config()["data"]["source"]: r for r in table.find([REPOSITORY / "experiments" / "results" / "data"])}
    found = 0
    for command in commands:
        settings, choices = composed(*shlex.split(command)[3 if "-m" in command else 2 :])
        checked = checks.check(settings, choices)
        if checked.data.source in records:
            found += 1
            record = records[checked.data.source]
            identity = record.environment()["identity"]
            assert identify(checked, choices).key == identity["key"]
    assert found == len(records) == 2


def test_the_tables_of_the_benchmark_are_those_of_its_results():
    benchmark = script("optimizer_step")
    page = (REPOSITORY / "docs" / "benchmarks.md").read_text()
    results = sorted((REPOSITORY / "experiments" / "results" / "benchmarks").glob("optimizer_step*.json"))
    assert results
    for file in results:
        found = json.loads(file.read_text())
        assert benchmark.table(benchmark.Row(**row) for row in found["rows"]) in page, file
        assert found["machine"]["cpu"] in page
        assert found["machine"]["torch"] in page
