"""Runs of train.py, many times over without its imports each time: a process that has made them forks.

Each line of standard input is a request in JSON, each line of standard output an answer:

    {"argv": […], "cwd": "…", "out": "…", "err": "…", "kill": {…}}  →  {"code": 0, "seconds": 1.5, "files": 0}

What a fork runs is train.py itself, as `python train.py …` runs it: its own process, settings, signals and exit code.
`kill` has it kill itself with SIGKILL, at an instant that repeats: `{"file": n}` at the n-th time that it touches a
file under run_root, `{"call": "module:Class.method", "n": n}` at the n-th call. `{"file": 0}` only counts: the answer
has `files`.
"""

import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

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


class Forks:
    """Runs train.py, one process after the other."""

    def __init__(self, place):
        self._place = place
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # a fork has none of the threads that it would wait for
        )
        assert json.loads(self._server.stdout.readline())["ready"]

    def __call__(self, *argv, cwd=None, kill=None):
        out, err = (self._place / name for name in ("out", "err"))
        request = {"argv": argv, "cwd": str(cwd or self._place), "out": str(out), "err": str(err), "kill": kill}
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        answer = json.loads(self._server.stdout.readline())
        return Done(**answer, out=out.read_text(), err=err.read_text())

    def close(self):
        self._server.stdin.close()
        self._server.wait(60)


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    """A function that runs train.py as a process: words, the directory it is in, where it dies -> `Done`."""
    found = Forks(tmp_path_factory.mktemp("forks"))
    yield found
    found.close()


# -- what follows runs in the process that forks ---------------------------------------------------------------------


def main():
    """Import what a run imports, then answer requests until there are no more."""
    names = ("session", "loop", "tasks.pretrain", "tasks.finetune", "display")
    names = [*(f"adafrugal.training.{name}" for name in names), "adafrugal.data.corpus", "adafrugal.reports.summary"]
    others = (
        "hydra",
        "torch",
        "sentencepiece",
        "transformers.models.llama.modeling_llama",
        "matplotlib.backends.backend_svg",
    )
    for name in (*others, *names):
        importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "w")
    answers.write(json.dumps({"ready": True}) + "\n")
    answers.flush()
    for line in sys.stdin:
        answers.write(json.dumps(_answer(json.loads(line))) + "\n")
        answers.flush()


def _answer(request):
    read, write = os.pipe()
    begun = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(read)
        _run(request, write)
    os.close(write)
    with os.fdopen(read) as told:
        last = told.read().split()[-1:]
    _, status = os.waitpid(child, 0)
    ended_by = status & 0x7F
    code = -ended_by if ended_by else status >> 8
    return {"code": code, "seconds": time.monotonic() - begun, "files": int(last[0]) if last else 0}


def _run(request, tell):
    """In the fork: be train.py, and never come back."""
    code = 1
    try:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(request["cwd"])
        sys.argv = [str(REPOSITORY / "train.py"), *request["argv"]]
        sys.path[0] = str(REPOSITORY)
        _die_where_told(request.get("kill") or {}, request["argv"], tell)
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:  # a traceback, as Python would print it
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _die_where_told(kill, argv, tell):
    if "file" in kill:
        root = next(word.removeprefix("run_root=") for word in argv if word.startswith("run_root="))
        _count_files(root, kill["file"], tell)
    if "call" in kill:
        module, _, path = kill["call"].partition(":")
        owner = importlib.import_module(module)
        *classes, name = path.split(".")
        for part in classes:
            owner = getattr(owner, part)
        setattr(owner, name, _deadly(getattr(owner, name), kill["n"]))


def _deadly(function, n):
    calls = []

    def called(*given, **named):
        calls.append(None)
        if len(calls) == n:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*given, **named)

    return called


def _count_files(root, n, tell):
    """Python says of every open, rename, removal and new directory that it is about to happen."""
    count, lock = [0], threading.Lock()

    def hook(event, given):
        touches = event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")
        named = given and isinstance(given[0], str | os.PathLike) and os.fspath(given[0])
        inside = named and (named.startswith(root) or (event in ("os.remove", "os.rmdir") and given[1] >= 0))
        if touches and inside:  # what removes a whole directory names files by the place that it is at
            with lock:
                count[0] += 1
                os.write(tell, b"%d\n" % count[0])
                if count[0] == n:
                    os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


if __name__ == "__main__":
    main()
