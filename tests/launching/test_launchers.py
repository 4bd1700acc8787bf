"""Sweeps whose jobs run elsewhere: side by side on this machine, and through submitit, here and on a played Slurm."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torture
from conftest import REPOSITORY

from adafrugal.launching import local
from adafrugal.launching import slurm as on_slurm
from adafrugal.launching.jobs import TOLD, Job
from adafrugal.reports import records as found_by_reports
from adafrugal.system.errors import DONE, FAILED, INTERRUPTED, WRONG
from adafrugal.system.signals import Stop
from adafrugal.tracking.record import Record

TWO = ["hydra/launcher=gpus", "hydra.launcher.n_jobs=2"]
SHORT = ["trainer.steps=4", "eval.every=4", "eval.tokens=256"]
LONG = ["trainer.steps=400", "eval.every=400", "eval.tokens=256"]  # enough to be stopped in the middle


def listed(done):
    """How each job ended, by the list at the end of what was printed."""
    return [line.split()[0] for line in done.split("\n\n")[-1].splitlines()]


def records(root):
    return [Record(file.parent) for file in sorted(root.glob("*/*/status.json"))]


@pytest.fixture
def begin(cache_root, tmp_path):
    """A function that starts a sweep of AdamW runs, in a session of its own, as a terminal would."""

    def start(*words):
        command = [sys.executable, str(REPOSITORY / "train.py"), "-m", "scale=smoke", "tracking=local",
                   "optimizer=adamw", f"run_root={tmp_path / 'runs'}", f"cache_root={cache_root}", *words]  # fmt: skip
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
                                start_new_session=True)  # fmt: skip

    start.root = tmp_path / "runs"
    return start


def until(true, process):
    """Wait for something that a process brings about."""
    end = time.monotonic() + 120
    while not true():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


# -- side by side on one machine -------------------------------------------------------------------------------------


@pytest.mark.skipif(not torture.LONG, reason="make torture; a job of several processes is stopped below")
def test_ctrl_c_stops_jobs_in_order_and_the_same_command_continues_them(begin):
    words = [*TWO, "seed=0,1", *LONG]
    process = begin(*words)
    until(lambda: len([r for r in records(begin.root) if r.metrics()]) == 2, process)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == INTERRUPTED, err
    assert listed(out) == ["interrupted"] * 2
    assert "Traceback" not in err
    assert {r.status for r in records(begin.root)} == {"interrupted"}
    again = begin(*words)
    out, err = again.communicate(timeout=120)
    assert again.returncode == DONE, err
    assert listed(out) == ["done"] * 2
    assert "[1] continuing after step" in out
    assert "[2] continuing after step" in out
    assert [r.metrics()[-1]["step"] for r in records(begin.root)] == [400, 400]


SEVERAL = ["hydra/launcher=gpus", "hydra.launcher.gpus_per_job=2", "trainer.parallel=ddp", "trainer.device=cpu"]


def test_a_job_of_several_processes_is_stopped_in_order_and_continued(begin):
    words = [*SEVERAL, "seed=0", "trainer.steps=3000", "eval.every=3000"]
    process = begin(*words)
    until(lambda: any(r.metrics() for r in records(begin.root)), process)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == INTERRUPTED, err
    (record,) = records(begin.root)
    assert record.status == "interrupted"
    saved = [event["step"] for event in record.events() if event["event"] == "checkpoint"]
    assert saved, "it was stopped in order"


@pytest.mark.skipif(not torture.LONG, reason="make torture; the file that tells it is tried below")
def test_how_a_job_of_several_processes_ended_comes_home(begin):
    process = begin(*SEVERAL, "hydra.launcher.n_jobs=2", "optimizer.lr=1e30,1e-3")
    out, err = process.communicate(timeout=180)
    assert process.returncode == FAILED, err
    assert listed(out) == ["failed", "done"]
    assert "optimizer.lr=1e+30: the loss is " in out
    assert out.count("[2] record  ") == 1, "the first process tells"


@pytest.mark.skipif(not torture.LONG, reason="make torture; the variables of such tasks are tried below")
def test_tasks_of_a_job_are_the_processes_of_one_run(begin):
    words = ["hydra/launcher=local", "hydra.launcher.tasks_per_node=2", "trainer.parallel=ddp", "trainer.device=cpu"]
    process = begin(*words, "seed=0")
    _, err = process.communicate(timeout=180)
    assert process.returncode == DONE, err
    (record,) = records(begin.root)
    assert record.summary()["processes"]["state_bytes"] == [record.summary()["state_bytes"]["end"]] * 2


def test_a_job_that_fails_leaves_the_others_alone(begin):
    process = begin(*TWO, *SHORT, "optimizer.lr=1e30,1e-3")
    out, err = process.communicate(timeout=120)
    assert process.returncode == FAILED
    assert listed(out) == ["failed", "done"]
    assert "optimizer.lr=1e+30: the loss is " in out
    assert "[1] error: the loss is " in err
    assert "[1] error: the loss is " not in out
    assert sorted(r.status for r in records(begin.root)) == ["failed", "finished"]


@pytest.mark.parametrize(("words", "said"), [
    ([*TWO, "trainer.steps=5,0"], "error: no job was started, since "),
    (["hydra/launcher=gpus", "hydra.launcher.gpus_per_job=2"], "trainer.parallel is none, and 2 processes make"),
    (["hydra/launcher=gpus", "hydra.launcher.n_jobs=0"], "error: hydra.launcher.n_jobs is 0; allowed: a whole number"),
    (["hydra/launcher=local", "hydra.launcher.tasks_per_node=2"], "trainer.parallel is none, and 2 processes"),
    (["hydra/launcher=slurm"], "error: hydra/launcher is slurm: Could not detect \"srun\""),
])  # fmt: skip
def test_what_is_wrong_is_refused_in_one_line_before_any_job_starts(forks, tmp_path, words, said):
    done = forks("-m", "scale=smoke", f"run_root={tmp_path}", *words)
    assert done.code == WRONG
    assert said in done.err
    assert done.err.count("\n") == 1
    assert not records(tmp_path)


def test_a_launcher_under_torchrun_is_refused(forks):
    """Each of its processes would start the whole sweep."""
    done = forks("-m", "hydra/launcher=gpus", "seed=0", env={"WORLD_SIZE": "2", "RANK": "0"})
    assert done.code == WRONG
    given = "hydra/launcher is gpus and WORLD_SIZE is 2"
    assert done.err == f"error: {given}; start train.py without torchrun, which it uses itself\n"


def test_a_launcher_without_a_sweep_is_refused(forks):
    done = forks("hydra/launcher=gpus")
    assert done.code == WRONG
    assert done.err == "error: hydra/launcher=gpus starts the jobs of a sweep; add -m, or leave it out\n"


@pytest.mark.parametrize(("launcher", "package"), [("gpus", "joblib"), ("slurm", "submitit"), ("local", "submitit")])
def test_a_launcher_that_is_not_installed_says_what_to_install(forks, launcher, package):
    missing = (
        "import importlib.util; found = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda name, *more: None if name == {package!r} else found(name, *more)"
    )
    done = forks("-m", f"hydra/launcher={launcher}", before=missing)
    assert done.code == WRONG
    given = f"error: hydra/launcher is {launcher}, which needs {package}"
    assert done.err == f"{given}; pip install {package}, or leave it out\n"


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
    side = local.SideBySide(["5", "7"], 1, Stop())
    with ThreadPoolExecutor(2) as threads:
        ends = list(threads.map(lambda number: side.run(number, [str(number)]), range(4)))
    assert {end.code for end in ends} == {DONE}
    first, *others = [(tmp_path / str(number)).read_text() for number in range(4)]
    assert {first, others[0]} == {"5", "7"}
    assert set(others) == {others[0]}
    assert f"── job 1 (GPU {first}): 0\n" in capfd.readouterr().out


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
    assert local.SideBySide([None], 2, Stop()).run(0, ["a=1", "b=2"]) == Job("a=1 b=2", *end)


def test_a_second_signal_reaches_all_processes_of_a_job(monkeypatch, tmp_path):
    """And a job that was not started stays so."""
    as_jobs(monkeypatch, "import signal, subprocess; signal.signal(signal.SIGTERM, lambda *_: None)\n"
                         f"child = subprocess.Popen(['sleep', '60']); open({str(tmp_path / 'up')!r}, 'w')\n"
                         "sys.exit(75 if child.wait() == -15 else 1)")  # fmt: skip
    stop, ends = Stop(), []
    side = local.SideBySide([None], 1, stop)
    thread = threading.Thread(target=lambda: ends.append(side.run(0, [])))
    thread.start()
    while not (tmp_path / "up").exists():
        time.sleep(0.01)
    stop.requested = True
    time.sleep(0.3)
    assert not ends
    side.stop_at_once()
    thread.join(20)
    assert ends == [Job("", INTERRUPTED)]
    assert side.run(1, ["seed=1"]) == Job("seed=1", INTERRUPTED, "not started")


def test_several_processes_of_a_job_are_started_by_torchrun():
    assert local.command(["sweeps=density", "seed=1"], 2) == [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        str(REPOSITORY / "train.py"), "sweeps=density", "seed=1", "hydra.mode=RUN",
    ]  # fmt: skip


# -- through submitit ------------------------------------------------------------------------------------------------


def test_submitit_on_this_machine_brings_the_ends_of_jobs_home(begin):
    """One job fails, the other is stopped with Ctrl-C."""
    words = ["hydra/launcher=local", "optimizer.lr=1e30,1e-3", *LONG]
    process = begin(*words)
    until(lambda: list(begin.root.glob(".submitit/*_result.pkl"))
          and any(r.status == "running" and r.metrics() for r in records(begin.root)), process)  # fmt: skip
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == INTERRUPTED, err
    assert listed(out) == ["failed", "interrupted"]
    found = {path.name for path in begin.root.iterdir()}
    assert found == {".submitit", "multirun.yaml", "pretrain-embedded-llama_tiny"}
    assert len(found_by_reports.find([begin.root])) == 2, "what submitit keeps is no run"
    if torture.LONG:
        again = begin(*words)
        out, err = again.communicate(timeout=120)
        assert again.returncode == FAILED, err
        assert listed(out) == ["failed", "done"]


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


def test_a_slurm_job_that_is_preempted_stops_in_order_goes_back_to_the_queue_and_ends(begin, slurm):
    process = begin("hydra/launcher=slurm", "seed=0,1", "hydra.launcher.partition=gpu", *LONG)
    until(lambda: len([r for r in records(begin.root) if r.metrics()]) == 2, process)
    os.kill(int((slurm / "pid-1").read_text()), signal.SIGUSR2)
    out, err = process.communicate(timeout=180)
    assert process.returncode == DONE, err
    assert listed(out) == ["done", "done"]
    asked = (slurm / "submission").read_text()
    for word in ("--array=0-1%2", "--signal=USR2@300", "--requeue", "--gpus-per-node=1", "--partition=gpu"):
        assert f"#SBATCH {word}\n" in asked
    assert (slurm / "scontrol.log").read_text().splitlines() == ["show job --oneliner 77_1", "requeue 77_1"]
    log = (slurm / "log-1").read_text()
    assert "interrupted after step" in log
    assert "continuing after step" in log
    assert [r.metrics()[-1]["step"] for r in records(begin.root)] == [400, 400]


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

    def interrupted(composed, choices, stop):
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
