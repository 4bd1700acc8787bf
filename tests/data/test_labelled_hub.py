"""Labelled data and encoders from the hub, through the real clients: they ask a server on this machine, see hub.py."""

import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY
from hub import Hub
from labelled_sets import write_encoder, write_glue

from adafrugal.tracking.record import Record

# repository -> what the server answers, and what is said of it
REFUSED = {
    "asks": ((403, "GatedRepo"), "which is gated: ask for access on its page at the hub, then `hf auth login`"),
    "gone": ((404, "RepoNotFound"), "which the hub does not have or does not show"),
    "down": ((503, ""), "and the hub has an error of its own (503)"),
    "unknown": (None, "which the hub does not have or does not show"),
}


def files(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    root, server = tmp_path_factory.mktemp("repositories"), Hub()
    (root / "glue").mkdir()
    server.add("org/glue", files(write_glue(root / "glue", ["rte", "stsb"])))
    server.add("org/encoder", files(write_encoder(root / "encoder")))
    without = files(root / "encoder")
    del without["model.safetensors"]
    server.add("org/weightless", without)
    for name, (refusal, _) in REFUSED.items():
        if refusal:
            server.fail(f"org/{name}", *refusal)
    yield server
    server.close()


@pytest.fixture
def run(hub, tmp_path):
    """A function that runs train.py with a hub and a cache of its own: overrides -> the finished process."""

    def start(*overrides, **env):
        command = [sys.executable, str(REPOSITORY / "train.py"), "experiments=glue/rte", "optimizer=adafrugal"]
        command += ["data.source=org/glue", "model=encoder", "model.name=org/encoder", "tracking=local"]
        command += ["trainer.sequence_length=48", "trainer.precision=fp32", "trainer.epochs=1", "trainer.batch_size=8"]
        places = [f"run_root={tmp_path / 'runs'}", f"cache_root={tmp_path / 'cache'}"]
        environment = {**os.environ, **hub.environment(tmp_path), **env}
        typed = [*command, *places, *overrides]
        return subprocess.run(typed, capture_output=True, text=True, timeout=120, cwd=tmp_path, env=environment)

    return start


def test_data_and_weights_come_from_the_hub_once_and_then_from_the_cache(run, hub, tmp_path):
    first = run()
    assert first.returncode == 0, first.stderr
    again = run("seed=1", HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    one, other = (Record(file.parent).environment()["data"] for file in tmp_path.rglob("status.json"))
    assert one == other
    assert one["source"] == {"name": "org/glue", "subset": "rte", "revision": None}


@pytest.mark.parametrize(
    ("setting", "name"),
    [("data.source", "asks"), ("data.source", "unknown"), ("model.name", "gone"), ("model.name", "down")],
)
def test_a_refusal_is_one_line_that_names_the_setting(setting, name, run):
    done = run(f"{setting}=org/{name}")
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: {setting} is org/{name}, {REFUSED[name][1]}")
    assert f"or copy it to this machine and set {setting} to that directory" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("data.subset=qnli", "data.subset is qnli: BuilderConfig 'qnli' not found. Available: ['rte', 'stsb']"),
        ("model.revision=v9", "has no such model.revision; allowed: a branch, a tag or a commit's sha"),
        ("model.name=org/weightless", "model.name is org/weightless, which transformers cannot read: "),
    ],
)
def test_what_a_repository_lacks_is_one_line(typed, line, run):
    done = run(typed)
    assert done.returncode == 2, done.stderr
    assert line in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
