"""What a command would cost: `train.py … --dry-run`."""

import re
import shlex
from dataclasses import replace

import pytest
from conftest import REPOSITORY

from adafrugal.data.corpus import locate
from adafrugal.launching import costs as of
from adafrugal.launching import dry_run
from adafrugal.launching.cost_table import _count, _flops, _hours, _size
from adafrugal.launching.costs import Counter, OnCard
from adafrugal.memory import estimate as memory
from adafrugal.settings.compose import check
from adafrugal.settings.identity import identify
from adafrugal.system.errors import DONE, WRONG, SettingError
from adafrugal.tracking import cards
from adafrugal.tracking.record import Record

PAGE = (REPOSITORY / "docs" / "runs.md").read_text()
SECTION = PAGE.split("## What will it cost")[1].split("\n## ")[0]
COMMANDS = [line.split(" #")[0].strip() for line in re.findall(r"^python .*", SECTION, re.MULTILINE)]


def test_a_sweep_is_listed_with_sums_and_nothing_is_written(train, tmp_path):
    words = "optimizer=adamw,frugal", "seed=0,1", "trainer.steps=30", "hydra/launcher=gpus"
    done = train("-m", *words, "--dry-run", "--card", "H100", "--share=0.5")
    assert (done.returncode, done.stderr) == (DONE, "")
    head, *jobs, total = done.stdout.split("\n\n")[0].splitlines()
    assert [re.split("  +", line)[1] for line in jobs] == [
        f"optimizer={arm} seed={seed}" for arm in ("adamw", "frugal") for seed in (0, 1)
    ]
    assert re.split("  +", head)[3:] == ["tokens", "model FLOPs", "memory", "checkpoints", "hours"]
    assert re.split("  +", total)[:4] == ["sum", "4 jobs", "0 done", "61.44 K"]  # 4 × 30 steps × 8 × 64
    assert "trainer.steps" not in "".join(jobs)  # all have it
    assert "of one h100 at 0.5 of its datasheet's 989 TFLOP/s" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_what_is_done_is_said_and_was_foretold(train, composed, cache_root, tmp_path):
    run = "optimizer=adafrugal", "trainer.steps=30", "checkpoint.keep=2", "data.window_tokens=1048576"
    assert train(*run).returncode == DONE
    listed = train("-m", *run[1:], "optimizer=adamw,adafrugal", "--dry-run").stdout
    rows = [re.split("  +", line) for line in listed.split("\n\n")[0].splitlines()]
    assert [row[2] for row in rows[1:3]] == ["to do", "done"]
    assert rows[3][:3] == ["sum", "2 jobs", "1 done"]
    assert rows[4] == ["left", "1 job", *rows[1][3:]]
    assert "hours: add --card h100" in listed

    places = f"run_root={tmp_path / 'runs'}", f"cache_root={cache_root}"
    found, choices = composed("scale=smoke", "tracking=local", *places, *run)
    settings = check(found, choices)
    record = Record(identify(settings, choices).directory)
    foretold, summary = Counter(None, measure=False).costs(settings), record.summary()
    assert (foretold.steps, foretold.tokens) == (summary["steps"], summary["tokens"])
    lines = [line for line in record.metrics() if "validation_loss" in line]
    assert of.evaluated_tokens(settings) == len(lines) * settings.eval.tokens
    assert foretold.estimate.parameters == summary["parameters"]
    state = max(stage.peak.state for stage in foretold.estimate.stages)
    assert state >= summary["state_bytes"]["start"]
    kept = [sum(file.stat().st_size for file in place.iterdir()) for place in record.directory.glob("checkpoints/*")]
    small = 60_000  # names, numbers, checksums, and the archive of each tensor
    assert foretold.checkpoints == (4 * summary["parameters"] + state) * 3
    assert max(kept) <= foretold.checkpoints / 3 + small
    assert len(kept) <= 3
    written = [file.stat().st_size for file in locate(settings, str).directory.rglob("*.npy")]
    assert foretold.stored <= sum(written) < 1.25 * foretold.stored  # a shard ends with a bundle of text


def test_memory_is_the_estimate_of_each_job(settings):
    """Although what jobs have in common is worked out once."""
    counter = Counter(None, measure=False)
    arms = ["optimizer=adamw"], ["optimizer=galore"], ["optimizer=frugal", "optimizer.density=0.1"], ["seed=3"], []
    arms += (["optimizer=frugal_displacement", "optimizer.subspace=columns"], ["optimizer.lr=1e-2"])
    for words in arms:
        chosen, _ = settings(*words)
        assert counter.costs(chosen).estimate == memory.estimate(chosen)
    assert len(counter._estimates) == 5


def test_a_continued_run_costs_what_it_adds(settings):
    words = ("trainer.steps=1250", "checkpoint.every=250", "checkpoint.keep=8", "eval.every=250")
    words += ("eval.last_tokens=null", "optimizer.interval.every=250")
    whole, _ = settings(*words)
    branch, _ = settings(*words, "trainer.continue_from=/runs/x/adafrugal-0123456789/checkpoints/step-00001000")
    counter = Counter(OnCard("h100", 0.5), measure=False)
    all_of_it, added = counter.costs(whole), counter.costs(branch)
    assert (all_of_it.steps, added.steps) == (1250, 250)
    assert added.tokens * 5 == all_of_it.tokens
    assert of.evaluated_tokens(branch) * 5 == of.evaluated_tokens(whole)
    assert added.flops * 5 == all_of_it.flops
    assert added.seconds * 5 == pytest.approx(all_of_it.seconds)
    kept = 5 + whole.checkpoint.best, 1 + whole.checkpoint.best
    assert added.checkpoints * kept[0] == all_of_it.checkpoints * kept[1]


def test_hours_count_what_recompute_repeats_and_the_cards_precision(settings):
    chosen, _ = settings("model=llama_3m", "trainer.precision=bf16")
    plain = OnCard("h100", 0.4).seconds(chosen)
    assert plain == pytest.approx(of.model_flops(chosen) / (989e12 * 0.4))
    recompute = replace(chosen, trainer=replace(chosen.trainer, activation_checkpointing="layers"))
    assert 1.05 * plain < OnCard("h100", 0.4).seconds(recompute) < 4 / 3 * plain
    assert of.model_flops(recompute) == of.model_flops(chosen)
    in_fp32 = replace(chosen, trainer=replace(chosen.trainer, precision="fp32"))
    assert OnCard("h100", 0.4).seconds(in_fp32) == 2 * plain
    assert OnCard("t4", 0.4).seconds(chosen) is None
    assert Counter(OnCard("t4", 0.4), measure=False).costs(chosen).unknown == ("hours: t4 has no bf16",)


@pytest.mark.parametrize("name", cards.typed())
def test_every_card_that_can_be_typed_has_a_peak(name):
    assert cards.peak_flops(cards.typed()[name], "auto") > 1e12


def test_a_figure_that_is_not_known_is_a_dash_with_its_reason(train):
    done = train("optimizer=adamw", "trainer.parallel=fsdp", "--dry-run")
    assert (done.returncode, done.stderr) == (DONE, "")
    assert re.search(r"^memory +–$", done.stdout, re.MULTILINE)
    assert "– memory and checkpoints: trainer.parallel is 'fsdp'; allowed: none, or with a number of " in done.stdout
    assert re.search(r"^tokens +10,240 in 20 steps of 8 × 64$", done.stdout, re.MULTILINE)


def test_a_decoder_of_another_shape_has_tokens_alone(train):
    tokens = "data.tokenizer.kind=pretrained", "data.tokenizer.name=someone/gpt"
    done = train("model=decoder", "model.name=someone/gpt", *tokens, "optimizer=adamw", "--dry-run", "--card", "h100")
    assert (done.returncode, done.stderr) == (DONE, "")
    assert re.search(r"^tokens +10,240 in", done.stdout, re.MULTILINE)
    assert re.search(r"^model FLOPs +–$", done.stdout, re.MULTILINE)
    assert f"– hours: {of.OTHER_SHAPE}" in done.stdout


def test_fine_tuning_has_as_many_steps_as_a_data_set_on_disk_gives(finetune_settings, settings_of):
    on_disk, _ = finetune_settings("rte", "trainer.steps=null", "trainer.epochs=3", "trainer.batch_size=8")
    found = Counter(None, measure=False).costs(on_disk)
    assert found.steps == 12  # 26 examples
    assert (found.tokens, found.is_bound) == (12 * 8 * on_disk.trainer.sequence_length, True)
    assert found.flops is None
    assert found.estimate.parameters * 4 < found.checkpoints  # with a state
    of_the_hub = settings_of("experiments=glue/rte")
    unknown = Counter(None, measure=False).costs(of_the_hub).unknown
    assert f"steps and tokens: {of.NO_SIZE}" in unknown
    assert f"memory and checkpoints: {of.NO_CONFIG}" in unknown, "nothing is fetched"


def test_text_on_disk_is_there_once_for_all_jobs_that_read_it_in_whole_windows(train):
    window = "data.window_tokens=16384"
    listed = train("-m", "seed=0,1", "trainer.steps=64,32", "optimizer=adamw", window, "--dry-run").stdout
    # 64 × 8 × 64 tokens of two bytes; a shard of 2^18 of the validation text, of two bytes and four for their lengths
    assert "text on disk: about 1.56 MiB of tokens, less of a text that is shorter" in listed
    whole = train("data.rows=document", "optimizer=adamw", "--dry-run").stdout
    assert "about 33.50 MiB of tokens if each of 160 documents has 400, as C4's" in whole  # a window of 2^24


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--card h101 --dry-run", "--card is h101; did you mean h100? allowed: b200, "),
        ("--dry-run --card h100 --share 3", "--share is 3; allowed: above 0, up to 1"),
        ("--dry-run --card h100 --share 0", "--share is 0; allowed: above 0, up to 1"),
        ("--dry-run --card h100 --share much", "--share is 'much'; allowed: a number"),
        ("--dry-run --share 0.4", "--share is 0.4; allowed: above 0, up to 1, a share of the peak of a --card"),
        ("--card h100", "--card is given without --dry-run"),
        ("--measure", "--measure is given without --dry-run"),
        ("--dry-run --measure --card h100", "--measure and --card both say the hours"),
        ("--dry-run --card", "--card: no value is given; allowed: python train.py … --dry-run [--card "),
        ("--dryrun", "there is no option --dryrun; did you mean --dry-run? allowed: "),
        ("--steps 100", "there is no option --steps; did you mean trainer.steps=…? Settings are written without "),
        ("--batch-size=4", "there is no option --batch-size; did you mean trainer.batch_size=4? Settings"),
    ],
)
def test_a_wrong_option_is_refused(words, says):
    with pytest.raises(SettingError, match=f"^{re.escape(says)}"):
        dry_run.options(shlex.split(words))


def test_the_other_words_are_hydras():
    words = ["optimizer=adamw", "-m", "--dry-run", "seed=0,1", "--card=h100", "--cfg", "job", "--config-dir=x"]
    found, left = dry_run.options(words)
    assert found == dry_run.Options(True, OnCard("h100", dry_run.SHARE), False)
    assert left == ["optimizer=adamw", "-m", "seed=0,1", "--cfg", "job", "--config-dir=x"]
    assert dry_run.options(["seed=1"]) == (dry_run.Options(False, None, False), ["seed=1"])


def test_a_wrong_option_or_setting_gets_one_line_and_exit_code_2(train, tmp_path):
    for words in (["--dry-run", "--card", "h101"], ["--dry-run", "optimizer.lr=-1"],
                  ["--dry-run", "-m", "optimizer.lr=1e-3,-1"]):  # fmt: skip
        done = train(*words)
        assert (done.returncode, done.stdout) == (WRONG, "")
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_base_of_a_sweep_is_called_so(train):
    done = train("sweeps=c4_60m", "--cfg", "job", scale=None)
    assert done.returncode == DONE and "seed: 0" in done.stdout
    assert done.stderr == (
        "--cfg prints what sweeps=c4_60m starts from, without the settings of its jobs; --dry-run lists the jobs\n"
    )
    assert train("--cfg", "job").stderr == ""
    assert "--dry-run --card h100" in train("--help").stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_page(command, train, tmp_path):
    """With smaller models; the mini scale that the last one names would take minutes to measure."""
    words = [word for word in shlex.split(command)[2:] if word != "scale=mini"]
    done = train(*words, scale="scale=mini" if "sweeps=" in command else "scale=smoke")
    assert (done.returncode, done.stderr) == (DONE, "")
    jobs = [line for line in done.stdout.splitlines() if re.match(r"\d+ ", line)]
    assert len(jobs) == (24 if "sweeps=" in command else 2 if "-m" in command else 0)
    if "--measure" in command:
        assert "hours: by 20 steps on cpu; seconds of a step: adamw 0." in done.stdout
        assert not any(line.endswith("–") for line in jobs)
    assert list(tmp_path.iterdir()) == []


def test_the_figures_of_the_page_are_those_of_its_command(settings_of):
    assert len(COMMANDS) == 4
    rows = [re.split("  +", line) for line in re.findall(r"^\d+ .*/.*", SECTION, re.MULTILINE)]
    assert len(rows) == 3
    for _, words, _, tokens, model, *_, hours in rows:
        found = settings_of(*words.split())
        assert tokens == _count(found.trainer.steps * 512 * 256)
        assert model == _flops(of.model_flops(found))
        assert hours == _hours(OnCard("h100", dry_run.SHARE).seconds(found))
    stored = _size(of._stored(found, found.trainer.steps * 512 * of.TOKENS_OF_A_DOCUMENT))
    assert f"text on disk: about {stored} of tokens if each of 102.40 M documents has 400" in SECTION
    # 28.2 ms a step, LLaMA 60M, 128 × 256 tokens (docs/gpu.md)
    words = "experiments=c4_60m/adamw", "trainer.batch_size=128", "trainer.micro_batch_size=128"
    assert of.flops.trained(settings_of(*words)) * 128 * 256 / 28.2e-3 / 989e12 == pytest.approx(0.31, abs=0.005)
