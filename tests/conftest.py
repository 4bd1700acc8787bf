"""What all tests share: one cache of prepared text for the session, and the settings of a tiny run."""

import atexit
import functools
import gc
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

if "OMP_WAIT_POLICY" not in os.environ:  # before torch is there; see adafrugal.system.threads
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:  # what one process of the tests compiles is there for all
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
    atexit.register(shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)

import hypothesis
import pytest
import torch
from filelock import FileLock

pytest_plugins = [
    "corpora",
    "labelled_sets",
    "forks",
    "hub",
    "torture",
    "tiny",
    "interpreted",
]  # fixtures of several directories

REPOSITORY = Path(__file__).resolve().parents[1]

hypothesis.settings.register_profile("the same examples each time", derandomize=True, database=None)
hypothesis.settings.load_profile("the same examples each time")


def script(name):
    """A script of experiments/benchmarks as a module."""
    path = REPOSITORY / "experiments" / "benchmarks" / f"{name}.py"
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # the scripts import each other
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    benchmark = sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))
    spec.loader.exec_module(benchmark)
    return benchmark


def pytest_collection_modifyitems(items):
    gc.collect()
    gc.freeze()  # each run collects at its end, which takes a quarter of a second with all that was imported
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A directory that all of xdist's workers have in common."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    root = tmp_path_factory.getbasetemp().parent / f"shared-{run}" if run else tmp_path_factory.mktemp("shared")
    root.mkdir(exist_ok=True)
    return root


@pytest.fixture(scope="session")
def cache_root(shared):
    return shared / "cache"


@pytest.fixture(scope="session")
def once(shared):
    """A function that makes something once for all of xdist's workers: a name, and what makes JSON of a directory."""

    def make(name, maker):
        made = shared / f"{name}.json"
        with FileLock(shared / f"{name}.lock"):
            if not made.exists():
                made.write_text(json.dumps(maker(shared)))
        return json.loads(made.read_text())

    return make


@pytest.fixture(scope="session")
def composed():
    """A function that composes settings in this process, and reads files once: overrides -> (composed, choices)."""
    from adafrugal.reports.arms import compose_once

    return lambda *overrides: compose_once(overrides)


@pytest.fixture(scope="session")
def settings_of(composed):
    """A function: words -> checked settings, composed once a session; no test may change them."""
    from adafrugal.settings.compose import check

    return functools.cache(lambda *words: check(*composed(*words)))


@pytest.fixture
def settings(composed, cache_root, tmp_path):
    """A function that gives the checked settings of a tiny run: overrides -> (settings, choices)."""
    from adafrugal.settings.compose import check

    def make(*overrides):
        places = [f"run_root={tmp_path / 'runs'}", f"cache_root={cache_root}", "tracking=local"]
        found, choices = composed("scale=smoke", *places, *overrides)
        return check(found, choices), choices

    return make


@pytest.fixture
def train(forks, cache_root, tmp_path):
    """A function that runs train.py on the tiny scale, in a directory of its own: a fork, or a process from the start.

    A process from the start is needed for variables that libraries read when they are imported, such as the hub's.
    `how` is as for `Forks.begin`.
    """

    def run(*arguments, scale="scale=smoke", tracking="tracking=local", env=None, timeout=240, **how):
        places = [f"run_root={tmp_path / 'runs'}", f"cache_root={cache_root}"]
        words = [word for word in (scale, tracking, *places, *arguments) if word]
        if not any(name.startswith("HF_") for name in env or {}):
            done = forks(*words, cwd=tmp_path, env=env, timeout=timeout, **how)
            return subprocess.CompletedProcess(words, done.code, done.out, done.err)
        command = [sys.executable, str(REPOSITORY / "train.py"), *words]
        environment = {**os.environ, **(env or {})}
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=tmp_path, env=environment)

    run.root = tmp_path / "runs"
    return run
