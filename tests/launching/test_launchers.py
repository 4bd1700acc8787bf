"""Sweeps whose jobs run elsewhere: side by side on this machine, and through submitit, here and on a played Slurm."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torture
from conftest import REPOSITORY

from adafrugal.launching import local
from adafrugal.launching import slurm as on_slurm
from adafrugal.launching.jobs import TOLD, Job, after_a_refusal
from adafrugal.reports import records as found_by_reports
from adafrugal.settings.compose import check
from adafrugal.settings.identity import identify
from adafrugal.system import files
from adafrugal.system.errors import DONE, FAILED, INTERRUPTED, WRONG
from adafrugal.system.signals import Stop
from adafrugal.tracking.record import Record

STEPS = 200  # enough to be stopped in the middle
LONG = [f"trainer.steps={STEPS}", f"eval.every={STEPS}", "eval.tokens=256"]
BASE = ["scale=smoke", "tracking=local", "optimizer=adamw"]


class Sweep:
    """A sweep of AdamW runs in a session of its own, as a terminal would start it."""

    def __init__(self, cache_root, tmp_path):
        self.root, self._place, self.words = tmp_path / "runs", tmp_path, [*BASE, f"run_root={tmp_path / 'runs'}"]
        self.words.append(f"cache_root={cache_root}")

    def begin(self, *words):
        command = [sys.executable, str(REPOSITORY / "train.py"), "-m", *self.words, *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, **pipes, cwd=self._place, start_new_session=True)

    def interrupt_once(self, true):
        self.once(true, lambda: os.killpg(self.process.pid, signal.SIGINT))  # Ctrl-C

    def once(self, true, then):
        """Do something as soon as the process has brought something about."""
        end = time.monotonic() + 120
        while not true():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < end
            time.sleep(0.05)
        then()

    def ends(self, code, *outcomes):
        """What it printed, once it has ended with a code, and its jobs as listed."""
        out, err = self.process.communicate(timeout=180)
        assert self.process.returncode == code, err
        assert tuple(line.split()[0] for line in out.split("\n\n")[-1].splitlines()) == outcomes or not outcomes
        return out, err

    def records(self):
        return [Record(file.parent) for file in sorted(self.root.glob("*/*/status.json"))]

    def is_training(self, jobs=1):
        """Whether so many runs have made steps."""
        return sum(bool(record.metrics()) for record in self.records()) == jobs


@pytest.fixture
def sweep(cache_root, tmp_path):
    return Sweep(cache_root, tmp_path)


@pytest.fixture
def busy(sweep, composed):
    """A function that lets another process write the run of some words, so that it is refused, and needs no torch."""
    with contextlib.ExitStack() as held:

        def make(*words):
            found, choices = composed(*sweep.words, *words)
            directory = identify(check(found, choices), choices).directory
            directory.mkdir(parents=True)
            held.enter_context(files.locked(directory / ".lock"))

        yield make


# -- side by side on one machine -------------------------------------------------------------------------------------

SEVERAL = ["hydra/launcher=gpus", "hydra.launcher.gpus_per_job=2", "trainer.parallel=ddp", "trainer.device=cpu"]


def test_a_job_of_several_processes_is_stopped_in_order_and_continued(sweep):
    sweep.begin(*SEVERAL, "seed=0", *LONG)
    sweep.interrupt_once(sweep.is_training)
    sweep.ends(INTERRUPTED)
    (record,) = sweep.records()
    assert record.status == "interrupted"
    assert any(event["event"] == "checkpoint" for event in record.events()), "it was stopped in order"
    if torture.LONG:
        sweep.begin(*SEVERAL, "seed=0", *LONG)
        assert "[1] continuing after step" in sweep.ends(DONE)[0]


@pytest.mark.skipif(not torture.LONG, reason="make torture; the file that tells it is tried below")
def test_how_a_job_of_several_processes_ended_comes_home(sweep):
    sweep.begin(*SEVERAL, "hydra.launcher.n_jobs=2", "optimizer.lr=1e30,1e-3")
    out, _ = sweep.ends(FAILED, "failed", "done")
    assert "optimizer.lr=1e+30: the loss is " in out
    assert out.count("[2] record  ") == 1, "the first process tells"


@pytest.mark.skipif(not torture.LONG, reason="make torture; the variables of such tasks are tried below")
def test_tasks_of_a_job_are_the_processes_of_one_run(sweep):
    tasks = ["hydra/launcher=local", "hydra.launcher.tasks_per_node=2", "trainer.parallel=ddp", "trainer.device=cpu"]
    sweep.begin(*tasks, "seed=0")
    sweep.ends(DONE)
    (record,) = sweep.records()
    assert record.summary()["processes"]["state_bytes"] == [record.summary()["state_bytes"]["end"]] * 2


def test_a_job_that_fails_leaves_the_others_alone(sweep, forks, busy, tally):
    busy(*LONG[1:], "trainer.steps=4")
    assert forks(*sweep.words, *LONG[1:], "trainer.steps=2").code == DONE
    sweep.begin("hydra/launcher=gpus", "hydra.launcher.n_jobs=2", *LONG[1:], "trainer.steps=4,2")
    out, err = sweep.ends(WRONG, "refused", "done")
    assert "is being written by another process" in out.split("\n\n")[-1]
    assert err.startswith("[1] error: ") and err.count("\n") == 1
    assert "[1] error: " not in out
    assert "[2] this run was finished before" in out
    tally("faults: two processes for one run")


NOT_THERE = (
    "import importlib.util; found = importlib.util.find_spec\n"
    "importlib.util.find_spec = lambda name, *more: None if name == 'submitit' else found(name, *more)"
)
LAUNCHED = "hydra/launcher is"


@pytest.mark.parametrize(("typed", "said", "more"), [
    ("-m hydra/launcher=gpus trainer.steps=5,0", "no job was started, since ", {}),
    ("-m hydra/launcher=gpus hydra.launcher.gpus_per_job=2", "trainer.parallel is none, and 2 processes make each", {}),
    ("-m hydra/launcher=gpus hydra.launcher.n_jobs=0", "hydra.launcher.n_jobs is 0; allowed: a whole number", {}),
    ("-m hydra/launcher=local hydra.launcher.tasks_per_node=2", "trainer.parallel is none, and 2 processes", {}),
    ("-m hydra/launcher=slurm", f"{LAUNCHED} slurm: Could not detect \"srun\"", {}),
    # each process of torchrun would start the whole sweep
    ("-m hydra/launcher=gpus seed=0", f"{LAUNCHED} gpus and WORLD_SIZE is 2; start train.py without torchrun, which it",
     {"env": {"WORLD_SIZE": "2", "RANK": "0"},
      "before": "from adafrugal.training.distributed import ranks; ranks._SPEAKS_WITHIN = 0"}),
    ("hydra/launcher=gpus", "hydra/launcher=gpus starts the jobs of a sweep; add -m, or leave it out", {}),
    *((f"-m hydra/launcher={name}", f"{LAUNCHED} {name}, which needs submitit; pip install submitit, or leave it out",
       {"before": NOT_THERE}) for name in ("slurm", "local")),
])  # fmt: skip
def test_what_is_wrong_is_refused_in_one_line_before_any_job_starts(forks, tmp_path, typed, said, more):
    done = forks(*typed.split(), "scale=smoke", f"run_root={tmp_path}", **more)
    assert done.code == WRONG
    assert done.err.startswith("error: ") and said in done.err and done.err.count("\n") == 1
    assert not list(tmp_path.glob("*/*/status.json"))


def test_gpus_are_those_that_the_user_allows_or_else_all(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert local.gpus() == []
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: A (UUID: GPU-a)'\necho '  MIG 1g: x'\necho 'GPU 1: B (UUID: GPU-b)'\n")
    tool.chmod(0o755)
    assert local.gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-c")
    assert local.gpus() == ["3", "GPU-c"]
    for none in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", none)
        assert local.gpus() == []


@pytest.fixture
def launcher(monkeypatch):
    """A function that makes the launcher of this machine: its settings, and the GPUs here -> the slots of its jobs."""
    from hydra_plugins.adafrugal_launchers import GpusLauncher

    def slots(here, **settings):
        monkeypatch.setattr(local, "gpus", lambda: here)
        return GpusLauncher(**{"gpus_per_job": 1, "n_jobs": None} | settings)._slots()

    return slots


def test_jobs_have_gpus_of_their_own_as_long_as_there_are_enough(launcher):
    four = ["0", "1", "2", "3"]
    assert launcher(four) == four
    assert launcher(four, gpus_per_job=2) == ["0,1", "2,3"]
    assert launcher(four, gpus_per_job=3) == ["0,1,2"]
    assert launcher(four, n_jobs=2) == ["0", "1"]
    assert launcher(["0", "1"], n_jobs=4) == ["0", "1", "0", "1"]
    assert launcher([], n_jobs=2) == [None, None]
    assert launcher([], gpus_per_job=2) == [None]
    with pytest.raises(ValueError, match=r"gpus_per_job is 3; allowed: up to 2"):
        launcher(["0", "1"], gpus_per_job=3)


def as_jobs(monkeypatch, script):
    """Have a script of Python in place of train.py; it has the job's words in `words`."""
    code = f"import os, sys, time; words = sys.argv[1:]\n{script}"
    monkeypatch.setattr(local, "command", lambda words, count: [sys.executable, "-c", code, *words])


def test_a_job_takes_the_gpu_that_is_free(monkeypatch, tmp_path, capfd):
    """The first job is the longest: the other GPU has all that follow."""
    as_jobs(monkeypatch, f"open({str(tmp_path)!r} + '/' + words[0], 'w').write(os.environ['CUDA_VISIBLE_DEVICES'])\n"
                         f"until = {str(tmp_path / '3')!r}\n"
                         "while words[0] == '0' and not os.path.exists(until): time.sleep(0.01)")  # fmt: skip
    ends = local.run([[str(number)] for number in range(4)], ["5", "7"], 1, Stop())
    assert ends == [Job(str(number), DONE, "see what it printed") for number in range(4)]
    assert [(tmp_path / str(number)).read_text() for number in range(4)] == ["5", "7", "7", "7"]
    assert "── job 1 (GPU 5): 0\n" in capfd.readouterr().out


@pytest.mark.parametrize(("script", "end"), [
    ("os.kill(os.getpid(), 9)", (FAILED, "ended by SIGKILL")),
    ("sys.exit(3)", (FAILED, "ended with exit code 3")),
    ("sys.exit(2)", (WRONG, "see what it printed")),
    ("sys.exit(75)", (INTERRUPTED, "")),
    (f"open(os.environ[{TOLD!r}], 'w').write('[\"x\", 75, \"\"]'); sys.exit(1)", (INTERRUPTED, "")),
    (f"open(os.environ[{TOLD!r}], 'w').write('[\"x\", 2, \"no data\"]'); sys.exit(1)", (WRONG, "no data")),
])  # fmt: skip
def test_a_jobs_end_is_what_it_told_or_else_its_exit_code(monkeypatch, script, end):
    as_jobs(monkeypatch, script)
    assert local.run([["a=1", "b=2"]], [None], 2, Stop()) == [Job("a=1 b=2", *end)]


def test_a_job_whose_setting_is_wrong_stops_those_that_have_not_started(monkeypatch):
    tell = "open(os.environ['ADAFRUGAL_END'], 'w').write(f'[\"x\", 2, \"no text\", {words[0]}]'); sys.exit(2)"
    as_jobs(monkeypatch, tell)
    one, *others = local.run([["true"], ["true"], ["false"]], [None], 1, Stop())
    assert one == Job("true", WRONG, "no text", True)
    assert others == [Job(word, WRONG, "not started, since job 1 was refused") for word in ("true", "false")]
    named = {0: Job("trainer.steps=9 data=a seed=0", WRONG, "trainer.steps is 9: too many", True)}
    assert after_a_refusal(named, "trainer.steps=9 data=a seed=1") == "not started, since job 1 was refused"
    assert after_a_refusal(named, "trainer.steps=8 data=a seed=0") is None, "what was wrong is set otherwise"
    assert after_a_refusal({0: Job("data=a", WRONG, "data.source is x", True)}, "data=b") is None
    assert [job.reason for job in local.run([["false"], ["false"]], [None], 1, Stop())] == ["no text"] * 2


@pytest.fixture
def asked(tmp_path):
    """A function: jobs, signals -> a `Stop` that gets the signals once so many jobs have written a file each."""
    with Stop() as stop, contextlib.ExitStack() as ends:
        stop.training = True

        def later(jobs, signals):
            def ask():
                while len(list(tmp_path.glob("up-*"))) < jobs:
                    time.sleep(0.01)
                for _ in range(signals):
                    os.kill(os.getpid(), signal.SIGTERM)
                    time.sleep(0.3)

            thread = threading.Thread(target=ask)
            thread.start()
            ends.callback(thread.join)
            return stop

        yield later


def test_the_first_signal_is_passed_on_to_all_jobs_and_no_more_start(monkeypatch, tmp_path, asked):
    as_jobs(monkeypatch, "import signal; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
                         f"open({str(tmp_path)!r} + '/up-' + words[0], 'w'); time.sleep(60)")  # fmt: skip
    ends = local.run([["0"], ["1"], ["2"]], [None, None], 1, asked(jobs=2, signals=1))
    assert ends == [Job("0", INTERRUPTED), Job("1", INTERRUPTED), Job("2", INTERRUPTED, "not started")]


def test_the_second_signal_reaches_all_processes_of_a_job(monkeypatch, tmp_path, asked):
    end = tmp_path / "end"
    as_jobs(monkeypatch, "import signal, subprocess; signal.signal(signal.SIGTERM, lambda *_: None)\n"
                         f"child = subprocess.Popen(['sleep', '60']); open({str(tmp_path / 'up-0')!r}, 'w')\n"
                         f"code = child.wait(); open({str(end)!r}, 'w').write(f'{{code}}\\n')")  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        local.run([[]], [None], 1, asked(jobs=1, signals=2))
    until = time.monotonic() + 20
    while not (end.exists() and end.read_text().endswith("\n")) and time.monotonic() < until:
        time.sleep(0.01)
    assert end.read_text() == f"{-signal.SIGTERM}\n"


def test_several_processes_of_a_job_are_started_by_torchrun():
    assert local.command(["sweeps=density", "seed=1"], 2) == [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        str(REPOSITORY / "train.py"), "sweeps=density", "seed=1", "hydra.mode=RUN",
    ]  # fmt: skip


# -- through submitit ------------------------------------------------------------------------------------------------


def test_submitit_on_this_machine_brings_the_ends_of_jobs_home(sweep, busy):
    """One job is refused, the other is stopped with Ctrl-C."""
    busy(*LONG, "seed=0")
    sweep.begin("hydra/launcher=local", *LONG, "seed=0,1")
    sweep.interrupt_once(lambda: list(sweep.root.glob(".submitit/*_result.pkl")) and sweep.is_training())
    assert "Traceback" not in sweep.ends(INTERRUPTED, "refused", "interrupted")[1]
    found = {path.name for path in sweep.root.iterdir()}
    assert found == {".submitit", "multirun.yaml", "pretrain-embedded-llama_tiny"}
    assert len(found_by_reports.find([sweep.root])) == 1, "what submitit keeps is no run"
    if torture.LONG:
        sweep.begin("hydra/launcher=local", *LONG, "seed=1")
        sweep.ends(DONE)


SBATCH = """#!/bin/sh
echo "Submitted batch job 77"
cp "$1" "$(dirname "$0")/submission"
for task in 0 1; do TASK=$task "$(dirname "$0")/start"; done
"""
START = """#!/bin/sh
export SLURM_JOB_ID=$((100 + TASK)) SLURM_ARRAY_JOB_ID=77 SLURM_ARRAY_TASK_ID=$TASK SLURM_NTASKS=1 SLURM_PROCID=0
sh "$(dirname "$0")/submission" > /dev/null 2> /dev/null &
"""
SRUN = """#!/bin/sh
echo $$ > "$(dirname "$0")/pid-$TASK"
shift 5  # --unbuffered --output … --error …
exec "$@" >> "$(dirname "$0")/log-$TASK" 2>&1
"""
SCONTROL = """#!/bin/sh
here=$(dirname "$0")
echo "$@" >> "$here/scontrol.log"
cat "$here/state"
if [ "$1" = requeue ]; then "$here/start"; fi
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Slurm's commands, played: an array of two tasks starts at once, and again when it is requeued."""
    place = tmp_path / "slurm"
    place.mkdir()
    sacct = "#!/bin/sh\necho 'JobID|State|NodeList'\n"
    parts = {"sbatch": SBATCH, "start": START, "srun": SRUN, "scontrol": SCONTROL, "sacct": sacct}
    for name, text in parts.items():
        (place / name).write_text(text)
        (place / name).chmod(0o755)
    (place / "state").write_text("JobId=100 JobState=RUNNING Reason=None\n")
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    return place


def test_a_slurm_job_that_is_preempted_stops_in_order_goes_back_to_the_queue_and_ends(sweep, forks, slurm):
    """The other job of the array was finished before."""
    assert forks(*sweep.words, *LONG[1:], "trainer.steps=2").code == DONE
    sweep.begin("hydra/launcher=slurm", "hydra.launcher.partition=gpu", *LONG[1:], f"trainer.steps=2,{STEPS}")
    sweep.once(lambda: sweep.is_training(jobs=2), lambda: os.kill(int((slurm / "pid-1").read_text()), signal.SIGUSR2))
    sweep.ends(DONE, "done", "done")
    asked = (slurm / "submission").read_text()
    for word in ("--array=0-1%2", "--signal=USR2@300", "--requeue", "--gpus-per-node=1", "--partition=gpu"):
        assert f"#SBATCH {word}\n" in asked
    assert (slurm / "scontrol.log").read_text().splitlines() == ["show job --oneliner 77_1", "requeue 77_1"]
    log = (slurm / "log-1").read_text()
    assert "interrupted after step" in log
    assert "continuing after step" in log
    assert {r.metrics()[-1]["step"] for r in sweep.records()} == {2, STEPS}


def test_a_slurm_job_that_is_cancelled_or_cannot_be_put_back_says_so(slurm):
    (slurm / "state").write_text("JobId=100 JobState=COMPLETING Reason=None\n")
    assert on_slurm._put_back("77_1") == "cancelled"
    assert (slurm / "scontrol.log").read_text().splitlines() == ["show job --oneliner 77_1"]
    (slurm / "scontrol").write_text("#!/bin/sh\necho 'JobState=RUNNING'\n[ $1 = show ] || { echo no >&2; exit 1; }\n")
    assert on_slurm._put_back("77_1") == "not requeued: no"
    (slurm / "scontrol").unlink()
    assert on_slurm._put_back("77_1").startswith("not requeued: [Errno 2]")


def test_only_the_first_process_of_a_slurm_job_puts_it_back(slurm, monkeypatch):
    given = {"SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "100", "SLURM_NTASKS": "2", "SLURM_PROCID": "1",
             "SLURM_LOCALID": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "node[7-8]"}  # fmt: skip
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    for name, value in (given | dict.fromkeys(names, "of another job") | {"MASTER_PORT": "29999"}).items():
        monkeypatch.setenv(name, value)
    seen = []

    def interrupted(composed, choices, stop, words):
        assert words == ["seed=1"]
        seen.append([os.environ[name] for name in names])
        os.kill(os.getpid(), signal.SIGUSR2)

    monkeypatch.setattr(on_slurm.jobs, "run", interrupted)
    assert on_slurm.run(["seed=1"]) == Job("seed=1", INTERRUPTED)
    assert seen == [["1", "2", "1", "2", "node7"]]
    assert not (slurm / "scontrol.log").exists()
    monkeypatch.setenv("SLURM_PROCID", "0")
    with pytest.raises(SystemExit) as left:
        on_slurm.run(["seed=1"])
    assert left.value.code == INTERRUPTED
    assert (slurm / "scontrol.log").read_text().splitlines()[-1] == "requeue 100"
