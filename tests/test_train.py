"""The real train.py as a process: what a user does, and what they find afterwards."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torture
from conftest import REPOSITORY
from transformers import LlamaForCausalLM

from adafrugal.system.errors import SettingError
from adafrugal.tracking.record import Record
from adafrugal.training import session


def records(root):
    return {file.parent.name.partition("-")[0]: Record(file.parent) for file in root.glob("*/*/status.json")}


def without_times(lines):
    timed = ("seconds", "tokens_per_second", "memory", "time")
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


def what_happened(record):
    """The events of the training itself, without their times."""
    kinds = ("refresh", "shrink", "interval")
    return without_times(event for event in record.events() if event["event"] in kinds)


@pytest.fixture(scope="module")
def sweep(forks, cache_root, tmp_path_factory):
    """Three optimizers as one multirun, with W&B beside the record; and the same command once more."""
    root = tmp_path_factory.mktemp("sweep")
    words = ["-m", "optimizer=adamw,frugal,adafrugal", "scale=smoke", f"run_root={root / 'runs'}"]
    words.append(f"cache_root={cache_root}")
    command = [sys.executable, str(REPOSITORY / "train.py"), *words]
    first = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=root)
    again = forks(*words, cwd=root)
    return root / "runs", first, again


def test_a_multirun_trains_every_optimizer(sweep):
    root, first, _ = sweep
    assert first.returncode == 0, first.stderr
    assert {name: record.status for name, record in records(root).items()} == dict.fromkeys(
        ("adamw", "frugal", "adafrugal"), "finished"
    )
    assert first.stdout.count("validation loss") == 3
    assert "warning" not in first.stdout
    assert first.stderr == ""


@pytest.mark.parametrize("arm", ["adamw", "frugal", "adafrugal"])
def test_a_record_holds_everything(sweep, arm):
    record = records(sweep[0])[arm]
    files = {path.name for path in record.directory.iterdir() if not path.name.startswith(".")}
    assert files == {
        "config.yaml", "status.json", "metrics.jsonl", "events.jsonl", "summary.json", "environment.json",
        "checkpoints", "picture.svg", "wandb",
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
    assert list(record.directory.glob("wandb/offline-run-*/*.wandb"))


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
    record = records(sweep[0])["adafrugal"]
    summary = record.summary()
    assert summary["density"] == 0.05, "the decay lasts the run"
    assert summary["split_moments"]["bytes"] == 2 * 4 * summary["split_moments"]["selected_entries"]
    # 14 matrices; 5% of them is round(0.7) = 1 matrix: 32 × 32 or 88 × 32 entries
    assert summary["split_moments"]["selected_entries"] in (32 * 32, 88 * 32)


def test_the_interval_is_observed_every_twentieth_of_the_run(sweep):
    lines = records(sweep[0])["adafrugal"].metrics()
    assert [line["step"] for line in lines if "validation_loss" in line] == list(range(1, 21))
    lines = records(sweep[0])["frugal"].metrics()
    assert [line["step"] for line in lines if "validation_loss" in line] == [10, 20]


def test_transformers_reads_the_final_model(sweep):
    record = records(sweep[0])["adafrugal"]
    model = LlamaForCausalLM.from_pretrained(record.directory / "checkpoints" / "step-00000020")
    assert model.config.vocab_size == 512


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


def test_the_same_command_gives_the_same_losses_bit_for_bit(sweep, train):
    done = train()
    assert done.returncode == 0, done.stderr
    first, second = (records(root)["adafrugal"] for root in (sweep[0], train.root))
    assert first.directory.name == second.directory.name
    assert without_times(first.metrics()) == without_times(second.metrics())


SIXTY = ["scale=smoke", "tracking=local", "trainer.steps=60", "eval.every=30", "optimizer.interval.every=15"]


def at_loss(n, number=signal.SIGKILL):
    """Where a fork gets a signal: at the n-th loss of training or evaluation."""
    return {"call": "adafrugal.training.tasks.pretrain:Pretrain.loss", "n": n, "signal": number}


@pytest.fixture(scope="module")
def sixty(forks, cache_root, tmp_path_factory):
    """The record of sixty steps that nothing disturbed."""
    root = tmp_path_factory.mktemp("sixty")
    done = forks(*SIXTY, f"run_root={root}", f"cache_root={cache_root}")
    assert done.code == 0, done.err
    return records(root)["adafrugal"]


def weights(record):
    return next(record.directory.glob("checkpoints/step-00000060/*.safetensors")).read_bytes()


def test_an_interrupted_run_continues_to_the_same_end(sixty, forks, cache_root, tmp_path):
    """SIGTERM and SIGINT within steps: exit code 75; the same command goes on, and every step is there once."""
    words = [*SIXTY, "checkpoint.every=17", f"run_root={tmp_path}", f"cache_root={cache_root}"]
    for number in (signal.SIGTERM, signal.SIGINT):
        done = forks(*words, kill=at_loss(23, number))
        assert done.code == 75, done.err
        assert "the same command continues the run" in done.out
        assert records(tmp_path)["adafrugal"].status == "interrupted"
    last = forks(*words)
    assert last.code == 0, last.err
    assert "continuing after step" in last.out
    record = records(tmp_path)["adafrugal"]
    assert without_times(record.metrics()) == without_times(sixty.metrics())
    assert what_happened(record) == what_happened(sixty)
    assert weights(record) == weights(sixty)


def test_a_killed_run_continues_from_its_last_whole_checkpoint(sixty, forks, cache_root, tmp_path):
    """SIGKILL, and a bit of the newest checkpoint turned: the one before it is used, and the end is the same."""
    words = [*SIXTY, "checkpoint.every=10", "checkpoint.keep=2", f"run_root={tmp_path}", f"cache_root={cache_root}"]
    assert forks(*words, kill=at_loss(58)).code == -signal.SIGKILL
    (record,) = records(tmp_path).values()
    assert record.status == "running"
    *_, before, newest = sorted(record.directory.glob("checkpoints/step-*"))  # the kill may leave one too many
    data = bytearray((newest / "state.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (newest / "state.pt").write_bytes(data)
    done = forks(*words)
    assert done.code == 0, done.err
    assert f"{newest.name} is damaged (state.pt is not as it was written) and not used" in done.out + done.err
    assert f"continuing after step {int(before.name.removeprefix('step-'))}\n" in done.out
    assert without_times(record.metrics()) == without_times(sixty.metrics())
    assert what_happened(record) == what_happened(sixty)
    assert record.summary()["refreshes"] == sixty.summary()["refreshes"]
    assert weights(record) == weights(sixty)


def test_a_sweep_goes_on_after_a_job_that_fails_and_says_which(train, tally):
    done = train("-m", "optimizer=adamw", "optimizer.lr=1e30,1e-3", "seed=0", tracking="tracking=wandb")
    assert done.returncode == 1
    assert "error: the loss is " in done.stderr
    assert "lower optimizer.lr" in done.stderr
    assert "Traceback" not in done.stderr
    failed, right = done.stdout.splitlines()[-2:]
    assert failed.startswith("     failed  job 1: ")
    assert "optimizer.lr=1e+30 seed=0: the loss is " in failed
    assert right.split()[0] == "done"
    assert sorted(Record(f.parent).status for f in train.root.glob("*/*/status.json")) == ["failed", "finished"]
    copies = [file.relative_to(train.root).parts[1] for file in train.root.glob("*/*/wandb/offline-run-*/*.wandb")]
    assert len(set(copies)) == len(copies) == 2, "each job has a copy of its own"
    again = train("-m", "optimizer=adamw", "optimizer.lr=1e30,1e-3", "seed=0", tracking="tracking=wandb")
    assert again.returncode == 1
    assert again.stdout.count("this run was finished before") == 1, "what is unfinished is made, and nothing else"
    tally("faults: a job of a sweep fails")


def test_a_sweep_that_is_stopped_says_what_it_did_not_start(forks, cache_root, tmp_path):
    words = ["-m", "scale=smoke", "tracking=local", "optimizer=adamw", "seed=0,1", f"cache_root={cache_root}"]
    done = forks(*words, f"run_root={tmp_path}", kill=at_loss(5, signal.SIGTERM))
    assert done.code == 75, done.err
    first, second = done.out.splitlines()[-2:]
    assert first.startswith("interrupted  job 1: ")
    assert second.startswith("interrupted  job 2: ")
    assert second.endswith(": not started")


def test_nobody_left_to_print_to_costs_no_checkpoint(cache_root, tmp_path):
    """`train.py 2>&1 | tee log`, where Ctrl-C ends the tee, too."""
    command = [sys.executable, str(REPOSITORY / "train.py"), "scale=smoke", "tracking=local", "trainer.steps=3000",
               "checkpoint.every=3000", "eval.every=20", f"run_root={tmp_path}",
               f"cache_root={cache_root}"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path)
    while "step " not in process.stdout.readline():
        pass
    process.stdout.close()
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 75
    (record,) = records(tmp_path).values()
    assert record.status == "interrupted"
    assert len(list(record.directory.glob("checkpoints/step-*"))) >= 1


@pytest.mark.parametrize(("where", "typed", "code"), [
    ("hydra._internal.hydra.Hydra.compose_config", "seed=0", 75), ("", "trainer.steps=0", 2), ("", "sweeps=nothing", 2)
])  # fmt: skip
def test_nobody_left_to_print_to_changes_no_exit_code(forks, tmp_path, where, typed, code):
    closed = "import os\nread, write = os.pipe()\nos.close(read)\nos.dup2(write, 1)\nos.dup2(write, 2)\n"
    before = closed + (interrupted_at(where) if where else "")
    assert forks("scale=smoke", f"run_root={tmp_path}", typed, before=before).code == code


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


def test_the_batch_may_come_in_parts(sweep, train):
    done = train("trainer.micro_batch_size=2")
    assert done.returncode == 0, done.stderr
    one, other = (records(root)["adafrugal"] for root in (sweep[0], train.root))
    assert one.directory.name == other.directory.name
    assert other.summary()["validation_loss"] == pytest.approx(one.summary()["validation_loss"], rel=1e-4)
    assert other.metrics()[-1]["tokens"] == one.metrics()[-1]["tokens"]


@pytest.mark.parametrize(
    "more",
    [
        ["optimizer.subspace=columns", "trainer.precision=bf16", "trainer.clip_norm=1.0", "schedule=cosine_restarts"],
        ["optimizer=frugal", "optimizer.density=0", "model.loss_chunk_rows=100", "schedule=linear"],
    ],
)
def test_settings_compose(train, more):
    done = train(*more, "schedule.warmup=2")
    assert done.returncode == 0, done.stderr
    (record,) = records(train.root).values()
    assert record.metrics()[-1]["loss"] < record.metrics()[0]["loss"]
    if "optimizer.density=0" in more:
        assert record.summary()["split_moments"] == {"bytes": 0, "selected_entries": 0}


def test_several_processes_are_refused_in_one_line(train):
    done = train(env={"WORLD_SIZE": "2"})
    assert done.returncode == 2
    assert not train.root.exists()
    assert done.stderr == (
        "error: WORLD_SIZE is 2 and trainer.parallel is none; allowed with several processes: trainer.parallel=ddp or "
        "fsdp; or start train.py without torchrun\n"
    )


@pytest.mark.parametrize(("number", "allowed"), [
    ("abc", "a number"), ("", "a number"), ("0", "a divisor of trainer.batch_size"), ("3", "a divisor"),
])  # fmt: skip
def test_any_other_number_of_processes_is_refused_too(train, number, allowed):
    done = train("trainer.parallel=ddp", env={"WORLD_SIZE": number, "RANK": "0"})
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: WORLD_SIZE is {number or 'not set'}; allowed: {allowed}")


def test_a_refusal_that_needs_no_torch_does_not_wait_for_it(tmp_path):
    script = (
        "import runpy, sys\n"
        f"sys.path.insert(0, {str(REPOSITORY)!r}); sys.argv = ['train.py', 'run_root=/proc/nowhere']\n"
        f"try: runpy.run_path({str(REPOSITORY / 'train.py')!r}, run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 2\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "run_root is /proc/nowhere" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_leaves_an_interrupted_run_as_it_was(train, settings):
    from adafrugal.settings.identity import identify

    record = Record(identify(*settings()).directory)
    record.begin({})
    record.set_status("interrupted")
    done = train("trainer.device=cuda")
    assert done.returncode == 2
    assert "torch finds no GPU" in done.stderr
    assert record.status == "interrupted"


def test_a_run_is_written_by_one_process_at_a_time(train, settings, tally):
    import fcntl

    from adafrugal.settings.identity import identify

    directory = identify(*settings()).directory
    directory.mkdir(parents=True)
    with (directory / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = train()
    assert done.returncode == 2
    assert "is being written by another process" in done.stderr
    tally("faults: two processes for one run")


def test_a_file_system_without_locks_says_so(settings, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(session.fcntl, "flock", refuse)
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


@pytest.mark.parametrize("seconds", [0.6, 1.5, 3.0] if torture.LONG else [1.5])
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
    "hydra._internal.hydra.Hydra.compose_config",
    "adafrugal.settings.compose.check",
    "adafrugal.training.session.Session.make",
])  # fmt: skip
def test_an_interruption_that_becomes_an_error_of_another_kind_is_one(forks, cache_root, tmp_path, where):
    """OmegaConf, interrupted in the middle of an assignment, raises an AttributeError of its own."""
    words = ["scale=smoke", "tracking=local", f"cache_root={cache_root}", f"run_root={tmp_path}"]
    done = forks(*words, before=interrupted_at(where))
    assert (done.code, done.err) == (75, "interrupted; the same command continues\n")


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


def test_no_key_of_the_environment_gets_into_a_record(train, tally):
    secret = "fake0123456789abcdef0123456789abcdef0123"
    done = train("trainer.steps=2", tracking="tracking=wandb", env={"WANDB_API_KEY": secret, "HF_TOKEN": secret})
    assert done.returncode == 0, done.stderr
    for file in train.root.rglob("*"):
        if file.is_file():
            assert secret.encode() not in file.read_bytes(), file
    tally("faults: a key in the environment")


def test_no_setting_holds_a_key(forks, tmp_path, tally):
    """Not by a name that reads the environment, and not typed: the record has every setting."""
    secret = "fake-secret-0123456789"
    typed_key = f"data.source=https://me:{secret}@host/x.txt"
    for typed, more in (("arm=${oc.env:MY_API_KEY}", []), (typed_key, []), (typed_key, ["-m", "seed=0,1"])):
        done = forks("data=text", typed, f"run_root={tmp_path / 'runs'}", *more, env={"MY_API_KEY": secret})
        assert done.code == 2
        assert done.err.startswith(f"error: {typed.split('=')[0]} holds the value of MY_API_KEY in the environment")
        assert done.err.count("\n") == 1
        assert secret not in done.err + done.out
        tally("faults: a key in a setting")
    assert not (tmp_path / "runs").exists()


def test_no_error_prints_a_key(forks, tmp_path, tally):
    """An unforeseen one, whose traceback quotes it."""
    secret = "fake-secret-0123456789"
    before = (
        "import os; import adafrugal.training.session as session\n"
        "def run(*_): raise ValueError('401 for ' + os.environ['HF_TOKEN'])\n"
        "session.run = run"
    )
    done = forks("-m", "seed=0,1", f"run_root={tmp_path / 'runs'}", before=before, env={"HF_TOKEN": secret})
    assert done.code == 1
    assert done.err.count("ValueError: 401 for ***") == 2
    assert done.out.count("failed  job") == 2
    assert secret not in done.err + done.out
    tally("faults: a key in an error")


def test_it_runs_from_any_directory_and_what_is_typed_is_relative_to_it(forks, cache_root, tmp_path):
    words = ["scale=smoke", "trainer.steps=2", "tracking=local", "run_root=here", f"cache_root={cache_root}"]
    done = forks(*words, "experiments=embedded/frugal", cwd=tmp_path)
    assert done.code == 0, done.err
    assert list((tmp_path / "here").glob("pretrain-embedded-llama_tiny/frugal-*/summary.json"))


def test_the_status_file_is_plain_json(sweep):
    for record in records(sweep[0]).values():
        found = json.loads((record.directory / "status.json").read_text())
        assert found["status"] == "finished"
        assert found["step"] == 20
