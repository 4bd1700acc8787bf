"""Labelled data and encoders from the hub, through the real clients: they ask a server on this machine, see hub.py."""

import pytest
from hub import REFUSALS
from labelled_sets import write_encoder, write_glue

from adafrugal.tracking.record import Record


def files(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module", autouse=True)
def repositories(hub, tmp_path_factory):
    root = tmp_path_factory.mktemp("repositories")
    (root / "glue").mkdir()
    hub.add("org/glue", files(write_glue(root / "glue", ["rte", "stsb"])))
    encoder = files(write_encoder(root / "encoder"))
    hub.add("org/encoder", encoder)
    hub.add("org/weightless", {name: content for name, content in encoder.items() if name != "model.safetensors"})


@pytest.fixture
def words(tmp_path):
    """A run with a cache of its own."""
    own = ["experiments=glue/rte", "optimizer=adafrugal", "tracking=local", f"run_root={tmp_path / 'runs'}"]
    own += ["data.source=org/glue", "model=encoder", "model.name=org/encoder", f"cache_root={tmp_path / 'cache'}"]
    own += ["trainer.sequence_length=48", "trainer.precision=fp32", "trainer.epochs=1", "trainer.batch_size=8"]
    return own


def test_data_and_weights_come_from_the_hub_once_and_then_from_the_cache(hub, hub_forks, words, tmp_path):
    fetched = []
    for seed in (0, 1):
        done = hub_forks(*words, f"seed={seed}", cwd=tmp_path)
        assert done.code == 0, done.err
        fetched.append([name for name in hub.requests.elements() if name.startswith("GET") and "/resolve/" in name])
    assert fetched[0] == fetched[1] != []
    one, other = (Record(file.parent).environment()["data"] for file in tmp_path.rglob("status.json"))
    assert one == other
    assert one["source"] == {"name": "org/glue", "subset": "rte", "revision": None}


LINES = {
    "data.source=org/asks": "data.source is org/asks, which is gated: ask for access on its page at the hub, then `hf",
    "data.source=org/unknown": "data.source is org/unknown, which the hub does not have or does not show",
    "model.name=org/gone": "model.name is org/gone, which the hub does not have or does not show",
    "model.name=org/down": "model.name is org/down, and the hub has an error of its own (503)",
    "data.subset=qnli": "data.subset is qnli: BuilderConfig 'qnli' not found. Available: ['rte', 'stsb']",
    "model.revision=v9": "has no such model.revision; allowed: a branch, a tag or a commit's sha",
    "model.name=org/weightless": "model.name is org/weightless, which transformers cannot read: ",
}


@pytest.mark.parametrize("typed", LINES)
def test_what_the_hub_refuses_or_does_not_have_is_one_line(typed, hub_forks, words):
    done = hub_forks(*words, typed)
    assert done.code == 2, done.err
    assert LINES[typed] in done.err and done.err.count("\n") == 1
    setting, _, name = typed.partition("=")
    local = f"or copy it to this machine and set {setting} to that directory"
    assert (local in done.err) is (name.removeprefix("org/") in (*REFUSALS, "unknown"))
