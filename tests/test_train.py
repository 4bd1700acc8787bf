"""The real train.py as a process: what a user does, and what they find afterwards."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from forks import Done
from torture import LONG, end_of, record_under
from transformers import LlamaForCausalLM

from adafrugal.settings.identity import identify
from adafrugal.system import files
from adafrugal.system.errors import SettingError
from adafrugal.tracking.record import Record
from adafrugal.training import session


def records(root):
    return {file.parent.name.partition("-")[0]: Record(file.parent) for file in root.glob("*/*/status.json")}


def without_times(lines):
    timed = ("seconds", "elapsed", "tokens_per_second", "memory", "time")
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


@pytest.fixture(scope="session")
def sweep(forks, cache_root, once):
    """Three optimizers as one multirun; and the same command once more."""

    def make(shared):
        root = shared / "sweep"
        root.mkdir()
        words = ["-m", "optimizer=adamw,frugal,adafrugal", "scale=smoke", "tracking=local", f"run_root={root}/runs"]
        return [str(root), *(asdict(forks(*words, f"cache_root={cache_root}", cwd=root)) for _ in range(2))]

    root, first, again = once("sweep", make)
    return Path(root) / "runs", Done(**first), Done(**again)


def test_a_multirun_trains_every_optimizer(sweep):
    root, first, _ = sweep
    assert first.code == 0, first.err
    assert {name: record.status for name, record in records(root).items()} == dict.fromkeys(
        ("adamw", "frugal", "adafrugal"), "finished"
    )
    assert first.out.count("validation loss") == 3
    assert "warning" not in first.out
    assert first.err == ""


@pytest.mark.parametrize("arm", ["adamw", "frugal", "adafrugal"])
def test_a_record_holds_everything(sweep, arm):
    record = records(sweep[0])[arm]
    files = {path.name for path in record.directory.iterdir() if not path.name.startswith(".")}
    assert files == {
        "config.yaml", "status.json", "metrics.jsonl", "events.jsonl", "summary.json", "environment.json",
        "checkpoints", "picture.svg",
    }  # fmt: skip
    assert record.config()["optimizer"]["kind"] == ("adamw" if arm == "adamw" else "frugal")
    lines = record.metrics()
    assert [line["step"] for line in lines] == sorted({line["step"] for line in lines})
    assert lines[-1]["step"] == 20
    for line in lines:
        assert {"loss", "lr", "density", "interval", "tokens", "tokens_per_second", "state_bytes"} <= set(line)
        assert set(line["seconds"]) == {
            "data", "forward", "backward", "optimizer", "refresh", "evaluation", "checkpoint", "wall"
        }  # fmt: skip
        assert line["memory"]
    assert lines[-1]["tokens"] == 20 * 8 * 64
    assert lines[-1]["validation_loss"] < lines[0]["loss"], "it learns"
    events = [event["event"] for event in record.events()]
    assert events[0] == "start"
    assert events.count("checkpoint") == 2
    assert ("refresh" in events) is (arm != "adamw")
    environment = record.environment()
    assert environment["packages"]["torch"].startswith("2.13.0")
    assert len(environment["data"]["fingerprint"]) == 64
    assert environment["precision"] == "fp32" or environment["device"] != "cpu"
    status = json.loads((record.directory / "status.json").read_text())
    assert (status["status"], status["step"]) == ("finished", 20)


def test_a_summary_says_what_was_kept_and_what_adamw_would_keep(sweep):
    found = {arm: record.summary() for arm, record in records(sweep[0]).items()}
    adamw, frugal, adafrugal = (found[arm]["state_bytes"] for arm in ("adamw", "frugal", "adafrugal"))
    assert adamw["start"] == adamw["end"] == adamw["adamw"] == adafrugal["adamw"]
    assert adafrugal["end"] < adafrugal["start"] <= adafrugal["peak"] < adamw["end"]
    assert frugal["end"] < adamw["end"]
    for summary in found.values():
        assert 0 < summary["unigram"]["loss"] < 7
        assert summary["validation_perplexity"] == pytest.approx(2.718281828 ** summary["validation_loss"], rel=1e-6)
        assert summary["seconds"]["wall"] > summary["seconds"]["backward"] > 0


def test_adafrugals_moments_end_at_the_subspaces_own_count(sweep):
    summary = records(sweep[0])["adafrugal"].summary()
    assert summary["density"] == 0.05, "the decay lasts the run"
    assert summary["split_moments"]["bytes"] == 2 * 4 * summary["split_moments"]["selected_entries"]
    # 14 matrices; 5% of them is round(0.7) = 1 matrix: 32 × 32 or 88 × 32 entries
    assert summary["split_moments"]["selected_entries"] in (32 * 32, 88 * 32)


def test_the_interval_is_observed_every_twentieth_of_the_run(sweep):
    for arm, steps in (("adafrugal", list(range(1, 21))), ("frugal", [10, 20])):
        lines = records(sweep[0])[arm].metrics()
        assert [line["step"] for line in lines if "validation_loss" in line] == steps


def test_transformers_reads_the_final_model(sweep):
    place = records(sweep[0])["adafrugal"].directory / "checkpoints" / "step-00000020"
    assert LlamaForCausalLM.from_pretrained(place).config.vocab_size == 512


def test_the_same_command_again_does_nothing_but_print_the_summaries(sweep):
    root, _, again = sweep
    assert again.code == 0
    assert again.out.count("validation loss") == 3
    assert "step 20/20" not in again.out
    assert again.out.count("finished before: nothing is done") == 3
    for record in records(root).values():
        assert [event["event"] for event in record.events()].count("start") == 1


def test_hydra_leaves_nothing_of_its_own_in_the_runs(sweep):
    root = sweep[0]
    assert {path.name for path in root.iterdir()} <= {"pretrain-embedded-llama_tiny", "multirun.yaml"}
    assert not list(root.rglob(".hydra"))
    assert not list(root.parent.glob("outputs"))


def test_the_same_command_gives_the_same_losses_bit_for_bit_and_the_batch_may_come_in_parts(sweep, train):
    (first,) = [record for name, record in records(sweep[0]).items() if name == "adafrugal"]
    for words in ([], ["trainer.micro_batch_size=2"]):
        done = train(*words)
        assert done.returncode == 0, done.stderr
        second = records(train.root)["adafrugal"]
        assert first.directory.name == second.directory.name
        if words:
            loss, other = (record.summary()["validation_loss"] for record in (first, second))
            assert other == pytest.approx(loss, rel=1e-4)
            assert second.metrics()[-1]["tokens"] == first.metrics()[-1]["tokens"]
        else:
            assert without_times(first.metrics()) == without_times(second.metrics())
            shutil.rmtree(second.directory)


def at_loss(n, number=signal.SIGKILL):
    """Where a fork gets a signal: at the n-th loss of training or evaluation."""
    return {"call": "adafrugal.training.tasks.pretrain:Pretrain.loss", "n": n, "signal": number}


def test_a_stopped_and_a_killed_run_continue_to_the_same_end(train, tmp_path):
    """SIGTERM, SIGINT and SIGKILL within steps, then a turned bit in the newest checkpoint: the one before is used."""
    words = ["trainer.steps=60", "eval.every=30", "optimizer.interval.every=15", "checkpoint.every=8"]
    words.append("checkpoint.keep=2")
    assert train(*words, f"run_root={tmp_path / 'whole'}").returncode == 0
    for number in (signal.SIGTERM, signal.SIGINT):
        done = train(*words, kill=at_loss(15, number))
        assert done.returncode == 75, done.stderr
        assert "the same command continues the run" in done.stdout
        assert record_under(train.root).status == "interrupted"
    assert train(*words, kill=at_loss(25)).returncode == -signal.SIGKILL
    record = record_under(train.root)
    assert record.status == "running"
    *_, before, newest = sorted(record.directory.glob("checkpoints/step-*"))  # the kill may leave one too many
    data = bytearray((newest / "state.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (newest / "state.pt").write_bytes(data)
    done = train(*words)
    assert done.returncode == 0, done.stderr
    assert f"{newest.name} is damaged (state.pt is not as it was written) and not used" in done.stdout + done.stderr
    assert f"continuing after step {int(before.name.removeprefix('step-'))}\n" in done.stdout
    assert end_of(train.root) == end_of(tmp_path / "whole")


def test_a_sweep_goes_on_after_a_job_that_fails_and_no_key_of_the_environment_gets_into_a_record(train, tally):
    secret = "fake0123456789abcdef0123456789abcdef0123"
    words = ["-m", "optimizer=adamw", "optimizer.lr=1e30,1e-3", "seed=0", "trainer.steps=4", "eval.tokens=256"]
    first = train(*words, tracking="", env={"WANDB_API_KEY": secret, "MY_TOKEN": secret})
    again = train(*words)
    assert first.returncode == again.returncode == 1
    assert first.stderr.startswith("error: the loss is ")
    assert "lower optimizer.lr" in first.stderr
    assert first.stderr.count("\n") == 1, "W&B warns of nothing, either"
    failed, right = first.stdout.splitlines()[-2:]
    assert failed.startswith("     failed  job 1: ")
    assert "optimizer.lr=1e+30 seed=0" in failed and ": the loss is " in failed
    assert right.split()[0] == "done"
    assert again.stdout.count("this run was finished before") == 1, "what is unfinished is made, and nothing else"
    assert sorted(Record(f.parent).status for f in train.root.glob("*/*/status.json")) == ["failed", "finished"]
    copies = [file.relative_to(train.root).parts[1] for file in train.root.glob("*/*/wandb/offline-run-*/*.wandb")]
    assert len(set(copies)) == 2, "each job has a copy of its own"
    for file in train.root.rglob("*"):
        assert not file.is_file() or secret.encode() not in file.read_bytes(), file
    tally("faults: a job of a sweep fails")
    tally("faults: a key in the environment")


def test_a_sweep_that_is_stopped_says_what_it_did_not_start(train):
    done = train("-m", "optimizer=adamw", "seed=0,1", kill=at_loss(5, signal.SIGTERM))
    assert done.returncode == 75, done.stderr
    first, second = done.stdout.splitlines()[-2:]
    assert first.startswith("interrupted  job 1: ")
    assert second.startswith("interrupted  job 2: ") and second.endswith(": not started")


def test_nobody_left_to_print_to_costs_no_checkpoint(forks, cache_root, tmp_path):
    """`train.py 2>&1 | head -n 3`, and Ctrl-C."""
    words = ["scale=smoke", "tracking=local", "trainer.steps=3000", "checkpoint.every=3000", "eval.every=20"]
    piped = (
        "import os; from subprocess import DEVNULL, PIPE, Popen\n"
        "reader = Popen(['head', '-n', '3'], stdin=PIPE, stdout=DEVNULL)\n"
        "for number in (1, 2): os.dup2(reader.stdin.fileno(), number)\n"
    )
    process = forks.begin(*words, f"run_root={tmp_path}", f"cache_root={cache_root}", before=piped)
    until = time.monotonic() + 120
    while not any(file.read_bytes().count(b"\n") > 8 for file in tmp_path.glob("*/*/metrics.jsonl")):
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(120).code == 75
    record = record_under(tmp_path)
    assert record.status == "interrupted"
    assert list(record.directory.glob("checkpoints/step-*"))


@pytest.mark.parametrize(("where", "typed", "code"), [
    ("hydra._internal.hydra.Hydra.compose_config", "seed=0", 75), ("", "trainer.steps=0", 2), ("", "sweeps=nothing", 2)
])  # fmt: skip
def test_nobody_left_to_print_to_changes_no_exit_code(train, where, typed, code):
    closed = "import os\nread, write = os.pipe()\nos.close(read)\nos.dup2(write, 1)\nos.dup2(write, 2)\n"
    assert train(typed, before=closed + (interrupted_at(where) if where else "")).returncode == code


def interrupted_at(where):
    """Python that has a function, by its full name, interrupted and make another error of that."""
    return (
        "import os, signal\n"
        "from pydoc import locate\n"
        "def broken(*given, **named):\n"
        "    try: os.kill(os.getpid(), signal.SIGINT)\n"
        "    except KeyboardInterrupt: raise AttributeError('left by half') from None\n"
        f"owner, _, name = {where!r}.rpartition('.')\n"
        "setattr(locate(owner), name, broken)\n"
    )


@pytest.mark.parametrize(("parallel", "size", "said"), [
    ("none", "2", "2 and trainer.parallel is none; allowed with several processes: trainer.parallel=ddp or fsdp; or "),
    ("ddp", "abc", "abc; allowed: a number"), ("ddp", "", "not set; allowed: a number"), ("ddp", "0", "0; allowed: a"),
])  # fmt: skip
def test_a_wrong_number_of_processes_is_refused_in_one_line(train, parallel, size, said):
    at_once = "from adafrugal.training.distributed import ranks; ranks._SPEAKS_WITHIN = 0"
    done = train(f"trainer.parallel={parallel}", env={"WORLD_SIZE": size, "RANK": "0"}, before=at_once)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: WORLD_SIZE is {said}") and done.stderr.count("\n") == 1
    assert not train.root.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_leaves_an_interrupted_run_as_it_was(train, settings):
    record = Record(identify(*settings()).directory)
    record.begin({})
    record.set_status("interrupted")
    done = train("trainer.device=cuda")
    assert done.returncode == 2
    assert "torch finds no GPU" in done.stderr
    assert record.status == "interrupted"


def test_a_file_system_without_locks_says_so(settings, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with pytest.raises(SettingError, match=r"whose file system has no locks \(No locks available\); two processes"):
        session.run(*settings())


def test_a_resume_on_other_data_is_refused(train):
    assert train().returncode == 0
    (record,) = records(train.root).values()
    record.set_status("interrupted")
    state = next(record.directory.glob("checkpoints/*/state.pt"))
    found = torch.load(state, weights_only=True)
    found["task"]["fingerprint"] = "0" * 64
    torch.save(found, state)
    checksums = state.parent / "checksums.json"
    known = json.loads(checksums.read_text()) | {"state.pt": hashlib.sha256(state.read_bytes()).hexdigest()}
    checksums.write_text(json.dumps(known))
    done = train()
    assert done.returncode == 2
    assert "was begun on other data (fingerprint 000000000000" in done.stderr
    assert "Traceback" not in done.stderr
    assert record.status == "failed"


@pytest.mark.parametrize("seconds", [0.6, 1.5, 3.0] if LONG else [1.5])
def test_an_interruption_before_the_run_began_is_no_traceback(cache_root, tmp_path, seconds):
    command = [sys.executable, str(REPOSITORY / "train.py"), "scale=smoke", "tracking=local", "trainer.steps=100000"]
    command += [f"cache_root={cache_root}", f"run_root={tmp_path}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    time.sleep(seconds)  # in the middle of the imports, where interruptions can get lost
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "Traceback" not in err


@pytest.mark.parametrize("where", [
    "hydra._internal.hydra.Hydra.compose_config", "adafrugal.settings.compose.check",
    "adafrugal.training.session.Session.make",
])  # fmt: skip
def test_an_interruption_that_becomes_an_error_of_another_kind_is_one(train, where):
    """OmegaConf, interrupted in the middle of an assignment, raises an AttributeError of its own."""
    done = train(before=interrupted_at(where))
    assert (done.returncode, done.stderr) == (75, "interrupted; the same command continues\n")


def test_so_is_one_before_anything_could_take_it(tmp_path):
    """In the middle of the import of what takes signals."""
    code = (
        "import runpy, sys\n"
        "class Interrupted:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.endswith('signals'): raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupted())\n"
        f"sys.argv = [{str(REPOSITORY / 'train.py')!r}]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (75, "interrupted; the same command continues\n")


@pytest.mark.gpu
def test_on_a_gpu_a_run_trains_stops_and_goes_on(train):
    assert train("trainer.device=cuda", "trainer.steps=40").returncode == 0
    (record,) = records(train.root).values()
    assert record.environment()["device"] != "cpu"
    assert record.metrics()[-1]["memory"]["peak"] > 0
    assert record.metrics()[-1]["validation_loss"] < record.metrics()[0]["loss"]
    record.set_status("running")
    for line in ("summary.json", "checkpoints/step-00000040/state.pt"):
        assert (record.directory / line).exists()
    again = train("trainer.device=cuda", "trainer.steps=40")
    assert again.returncode == 0, again.stderr
    assert "continuing after step 40" in again.stdout


def test_no_setting_holds_a_key(train, tally):
    """Not by a name that reads the environment, and not typed: the record has every setting."""
    secret = "fake-secret-0123456789"
    typed_key = f"data.source=https://me:{secret}@host/x.txt"
    for typed, more in (("arm=${oc.env:MY_API_KEY}", []), (typed_key, []), (typed_key, ["-m", "seed=0,1"])):
        done = train("data=text", typed, *more, env={"MY_API_KEY": secret})
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {typed.split('=')[0]} holds the value of MY_API_KEY in the environment")
        assert done.stderr.count("\n") == 1
        assert secret not in done.stderr + done.stdout
        tally("faults: a key in a setting")
    assert not train.root.exists()


def test_no_error_prints_a_key(train, tally):
    """An unforeseen one, whose traceback quotes it."""
    secret = "fake-secret-0123456789"
    before = (
        "import os; import adafrugal.training.session as session\n"
        "def run(*_): raise ValueError('401 for ' + os.environ['MY_TOKEN'])\n"
        "session.run = run"
    )
    done = train("-m", "seed=0,1", before=before, env={"MY_TOKEN": secret})
    assert done.returncode == 1
    assert done.stderr.count("ValueError: 401 for ***") == 2
    assert done.stdout.count("failed  job") == 2
    assert secret not in done.stderr + done.stdout
    tally("faults: a key in an error")


def test_it_runs_from_any_directory_and_what_is_typed_is_relative_to_it(train, tmp_path):
    done = train("trainer.steps=2", "run_root=here", "experiments=embedded/frugal")
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "here").glob("pretrain-embedded-llama_tiny/frugal-*/summary.json"))
