"""Runs of train.py without its imports each time: a process that has made them forks.

Each line of standard input is a request in JSON, each line of standard output its answer:

    {"argv": […], "cwd": "…", "place": "…", "env": {…}, "before": "…", "kill": {…}}  →  {"pid": 123}
    {"wait": 123, "timeout": 240}                                                    →  {"code": 0, "seconds": 1.5}

A fork runs train.py itself, as `python train.py …` does, with its own process group, settings, signals and exit code.
`before` is Python that runs first, such as a patch. `kill` makes the fork kill itself with SIGKILL at an instant that
repeats: `{"file": n}` at the n-th time that it touches a file under run_root (0 only counts), `{"call":
"module:Class.method", "n": n}` at the n-th call; `"signal"` names another signal.
"""

import gc
import importlib
import itertools
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from pydoc import locate
from unittest import mock

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass
class Done:
    """A process that has ended: its exit code (−9 for SIGKILL), what it printed, and how many files it touched."""

    code: int
    out: str
    err: str
    seconds: float
    files: int


class Begun:
    """A fork under way."""

    def __init__(self, forks, pid, place):
        self._forks, self.pid, self._place = forks, pid, place

    def send_signal(self, number):
        os.kill(self.pid, number)

    def wait(self, timeout=240):
        ended = self._forks.ask({"wait": self.pid, "timeout": timeout})
        out, err, files = ((self._place / name).read_text() for name in ("out", "err", "files"))
        return Done(**ended, out=out, err=err, files=int(files or 0))


class Forks:
    """Begins runs of train.py, or runs them to their end; `by`: the command that starts their process, `pid`."""

    def __init__(self, place, *by):
        self._place, self._count = place, 0
        alone = {**os.environ, "OMP_NUM_THREADS": "1"}  # a fork has none of the threads that it would wait for
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._server = subprocess.Popen([*by, sys.executable, __file__], **pipes, text=True, env=alone)
        self.pid = self._server.pid
        assert json.loads(self._server.stdout.readline())["ready"]

    def ask(self, request):
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def begin(self, *argv, cwd=None, env=None, before="", kill=None):
        self._count += 1
        place = self._place / str(self._count)
        place.mkdir()
        request = {"argv": argv, "cwd": str(cwd or place), "place": str(place), "before": before, "kill": kill}
        return Begun(self, self.ask(request | {"env": {**os.environ, **(env or {})}})["pid"], place)

    def ranks(self, size, *argv, kill=None, **how):
        """Begin the processes of one run, with the environment that torchrun gives; `kill` is for the last."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            env = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
        ranks = [{**env, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
        return [self.begin(*argv, env=env, kill=kill if env is ranks[-1] else None, **how) for env in ranks]

    def __call__(self, *argv, timeout=240, **how):
        return self.begin(*argv, **how).wait(timeout)

    def close(self):
        self._server.stdin.close()
        self._server.wait(60)


@pytest.fixture(scope="session")
def forks(tmp_path_factory, hub):
    """A function that runs train.py as a process: its words and how (see `Forks.begin`) -> `Done`.

    The hub's clients read its address when they are imported, so all of these processes know `hub`.
    """
    with mock.patch.dict(os.environ, hub.environment):
        found = Forks(tmp_path_factory.mktemp("forks"))
    yield found
    found.close()


# -- what follows runs in the process that forks ---------------------------------------------------------------------


def main():
    """Import what a run imports, then answer requests until there are no more."""
    ours = "memory.estimate reports.summary reports.pictures data.corpus data.labelled training.run training.display "
    ours += "training.compiling training.tasks.pretrain training.tasks.finetune"
    others = "hydra torch sentencepiece datasets transformers.models.llama.modeling_llama "
    others += "matplotlib.backends.backend_svg"
    for name in (*others.split(), *(f"adafrugal.{name}" for name in ours.split())):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # forks collect only what they make, and share the rest
    answers = os.fdopen(os.dup(1), "w")
    begun = {}
    answers.write(json.dumps({"ready": True}) + "\n")
    answers.flush()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = _wait(request["wait"], request["timeout"], begun.pop(request["wait"]))
        else:
            pid = os.fork() or _run(request)
            begun[pid] = time.monotonic()
            answer = {"pid": pid}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _wait(pid, timeout, begun):
    until = time.monotonic() + timeout
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > until:
            os.killpg(pid, signal.SIGKILL)
        time.sleep(0.01)
    return {"code": os.waitstatus_to_exitcode(ended[1]), "seconds": time.monotonic() - begun}


def _run(request):
    """In the fork: be train.py, and never come back."""
    code, place = 1, Path(request["place"])
    with suppress(OSError):
        os.setsid()
    try:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(place / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        files = os.open(place / "files", os.O_WRONLY | os.O_CREAT)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["env"])
        sys.argv = [str(REPOSITORY / "train.py"), *request["argv"]]
        sys.path[0] = str(REPOSITORY)
        exec(request["before"], {})
        _die_where_told(request["kill"] or {}, request["argv"], files)
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:  # a traceback, as Python would print it
        sys.excepthook(*sys.exc_info())
    else:
        code = 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _die_where_told(kill, argv, files):
    if "file" in kill:
        root = next(word.removeprefix("run_root=") for word in argv if word.startswith("run_root="))
        _count_files(root, kill["file"], files)
    if "call" in kill:
        where, _, name = kill["call"].replace(":", ".").rpartition(".")
        owner = locate(where)
        setattr(owner, name, _deadly(getattr(owner, name), kill["n"], kill.get("signal", signal.SIGKILL)))


def _deadly(function, n, number):
    calls = itertools.count(1)

    def called(*given, **named):
        if next(calls) == n:
            os.kill(os.getpid(), number)
        return function(*given, **named)

    return called


def _count_files(root, n, files):
    """Python says of every open, rename, removal and new directory that it is about to happen."""
    count, lock = [0], threading.Lock()

    def hook(event, given):
        touches = event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")
        named = given and isinstance(given[0], str | os.PathLike) and os.fspath(given[0])
        inside = named and (named.startswith(root) or (event in ("os.remove", "os.rmdir") and given[1] >= 0))
        if touches and inside:  # what removes a whole directory names files by the place that it is at
            with lock:
                count[0] += 1
                os.pwrite(files, b"%d" % count[0], 0)
                if count[0] == n:
                    os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


if __name__ == "__main__":
    main()
