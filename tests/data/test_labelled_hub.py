"""Labelled data and encoders from the hub, through the real clients: they ask a server on this machine, see hub.py."""

import pytest
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
    for seed in (0, 1):
        before = sum(request.startswith("GET") and "/resolve/" in request for request in hub.requests.elements())
        done = hub_forks(*words, f"seed={seed}", cwd=tmp_path)
        assert done.code == 0, done.err
    after = sum(request.startswith("GET") and "/resolve/" in request for request in hub.requests.elements())
    assert after == before > 0
    one, other = (Record(file.parent).environment()["data"] for file in tmp_path.rglob("status.json"))
    assert one == other
    assert one["source"] == {"name": "org/glue", "subset": "rte", "revision": None}


@pytest.mark.parametrize(
    ("setting", "name", "line"),
    [
        ("data.source", "asks", "which is gated: ask for access on its page at the hub, then `hf auth login`"),
        ("data.source", "unknown", "which the hub does not have or does not show"),
        ("model.name", "gone", "which the hub does not have or does not show"),
        ("model.name", "down", "and the hub has an error of its own (503)"),
    ],
)
def test_a_refusal_is_one_line_that_names_the_setting(setting, name, line, hub_forks, words):
    done = hub_forks(*words, f"{setting}=org/{name}")
    assert done.code == 2, done.err
    assert done.err.startswith(f"error: {setting} is org/{name}, {line}")
    assert f"or copy it to this machine and set {setting} to that directory" in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("data.subset=qnli", "data.subset is qnli: BuilderConfig 'qnli' not found. Available: ['rte', 'stsb']"),
        ("model.revision=v9", "has no such model.revision; allowed: a branch, a tag or a commit's sha"),
        ("model.name=org/weightless", "model.name is org/weightless, which transformers cannot read: "),
    ],
)
def test_a_missing_subset_revision_or_file_is_one_line(typed, line, hub_forks, words):
    done = hub_forks(*words, typed)
    assert done.code == 2, done.err
    assert line in done.err
    assert done.err.count("\n") == 1, done.err
