"""Text and tokenizers from the hub, through the real clients: they ask a server on this machine, see hub.py."""

import gzip
import io
import json
import os
import subprocess
import sys

import pyarrow
import pytest
import tokenizers
from hub import Hub
from pyarrow import parquet

from adafrugal.data.text import tokenizer

CARD = b"""---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/c4-train.*.json.gz
  - split: validation
    path: en/c4-validation.*.json.gz
- config_name: vi
  data_files: vi/*.json.gz
---
"""
TEXTS = [f"The matrix {n} holds {n * n % 97} columns, and the token {n % 13} reads them." for n in range(700)]
TRAIN, VALIDATION = TEXTS[:600], TEXTS[600:]
SECOND = "en/c4-train.00001-of-00002.json.gz"
LOCAL = "or copy it to this machine and set {setting} to that directory"
GATED = f"which is gated: ask for access on its page at the hub, then `hf auth login` (or set HF_TOKEN), {LOCAL}"
HIDDEN = f"which the hub does not have or does not show: check the name, `hf auth login` if it is private, {LOCAL}"
LIMITED = f"and the hub limits the rate of requests (429): wait, `hf auth login`, {LOCAL}"
DOWN = f"and the hub has an error of its own (503): try again later, {LOCAL}"
UNREACHED = f"and the hub cannot be reached: check the network, {LOCAL}"
OFFLINE = f"but HF_HUB_OFFLINE is set: unset it, {LOCAL}"
NO_TEXT = "which has no data files that datasets can read"
NO_SCRIPT = "data.subset is null: Dataset scripts are no longer supported, but found script.py"
NO_TOKENIZER = (
    "which has no tokenizer that transformers can read without code or packages of its own; allowed: tokenizers with a "
    "tokenizer.json"
)
NO_REVISION = "which has no such data.revision; allowed: a branch, a tag or a commit's sha"
# repository -> what the server answers, and what is said of it; the last three are not there, whatever their names say
REFUSED = {
    "asks": ((401, "GatedRepo"), GATED),
    "waits": ((403, "GatedRepo"), GATED),
    "forbids": ((403, ""), HIDDEN),
    "gone": ((404, "RepoNotFound"), HIDDEN),
    "limited": ((429, ""), LIMITED),
    "down": ((503, ""), DOWN),
    "silent": ((0, ""), UNREACHED),
    "unknown": (None, HIDDEN),
    "aggregated": (None, HIDDEN),
    "offline": (None, HIDDEN),
}
TRAINED = ["data.tokenizer.kind=train", "data.tokenizer.name=null", "data.tokenizer.vocabulary_size=300"]
# reads sources as the lines of its input say, each as if it were a new process
READER = """
import json, sys
from pathlib import Path
from huggingface_hub import HfFileSystem
from adafrugal.settings.schema import CorpusSettings
from adafrugal.system.errors import SettingError
from adafrugal.data.text import documents, sources
for line in sys.stdin:
    cache_root, *settings = json.loads(line)
    HfFileSystem.clear_instance_cache()
    try:
        source = sources.resolve(CorpusSettings(**settings[0]), Path(cache_root), str)
        found = {"about": source.described(), "fingerprint": source.fingerprint}
        for name, part in (("train", source.train), ("validation", source.validation)):
            bundles = sources.read(source, part, sources.Position())
            found[name] = [text for b in bundles for text in documents.select(b.pieces, part.rules).texts]
    except SettingError as error:
        found = {"error": str(error)}
    print(json.dumps(found), flush=True)
"""


def lines(texts):
    """Documents as a file of C4 holds them."""
    rows = ({"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "https://example.org"} for text in texts)
    return gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), mtime=0)


C4 = {
    "README.md": CARD,
    "en/c4-train.00000-of-00002.json.gz": lines(TRAIN[:300]),
    SECOND: lines(TRAIN[300:]),
    "en/c4-validation.00000-of-00001.json.gz": lines(VALIDATION),
    "vi/c4-train.00000-of-00001.json.gz": lines(["Ma trận có các cột."]),
}


@pytest.fixture(scope="module")
def hub():
    server = Hub()
    server.add("org/c4", C4)
    server.add("org/script", {"README.md": b"a script\n", "script.py": b"import datasets\n"})
    server.add("org/code", {"README.md": b"no data\n", "main.c": b"int main(void) {}\n"})
    for name, (refusal, _) in REFUSED.items():
        if refusal:
            server.fail(f"org/{name}", *refusal)
    yield server
    server.close()


@pytest.fixture(scope="module")
def read(hub, tmp_path_factory):
    """A function that reads a source in another process: settings -> what it found, or the error."""
    directory = tmp_path_factory.mktemp("reader")
    env = {**os.environ, **hub.environment(directory)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", READER], env=env, **pipes) as process:

        def ask(**settings):
            process.stdin.write(json.dumps([str(directory / "cache"), settings]) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield ask
        process.stdin.close()


@pytest.fixture
def own_cache(tmp_path):
    return tmp_path / "own"


@pytest.fixture
def run(train, hub, own_cache, tmp_path):
    """A function that runs train.py with a hub and a cache of its own: overrides -> the finished process."""
    places = ["data=c4", "data.source=org/c4", "model=llama_tiny", "data.processes=1", f"cache_root={own_cache}"]

    def start(*overrides, server=hub, **env):
        return train(*places, *overrides, env={**server.environment(tmp_path), **env})

    return start


@pytest.fixture
def local_text(tmp_path):
    """Settings of a corpus that needs no hub, relative to where `run` runs."""
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return ["data=text", "data.source=texts.jsonl"]


def said(setting, name, line):
    return f"error: {setting} is {name}, {line.format(setting=setting)}"


def test_a_repository_is_read_in_order_at_its_commit(hub, read):
    sha = hub.add("org/ordered", C4)
    found = read(source="org/ordered", subset="en")
    assert (found["train"], found["validation"]) == (TRAIN, VALIDATION)
    assert found["about"]["revision"] == sha
    assert found["about"]["files"] == {"train": 2, "validation": 1}


def test_a_newer_commit_is_not_taken_by_who_has_read_an_older_one(hub, read):
    old = hub.add("org/growing", C4)
    found = read(source="org/growing", subset="en")
    assert hub.add("org/growing", {**C4, SECOND: lines(["newer"])}) != old
    asked = hub.requests["HEAD /datasets/org/growing/resolve/main/README.md"]
    assert f"@{old}/" in read(source="org/growing", subset="en")["error"]  # which this server no longer has
    assert hub.requests["HEAD /datasets/org/growing/resolve/main/README.md"] == asked
    newer = read(source="org/growing", subset="en", revision="main")
    assert newer["train"] == [*TRAIN[:300], "newer"]
    assert newer["fingerprint"] != found["fingerprint"]


def test_parquet_files_without_a_card_are_held_out_by_hash(hub, read):
    file = io.BytesIO()
    parquet.write_table(pyarrow.table({"id": range(len(TEXTS)), "content": TEXTS}), file, row_group_size=100)
    sha = hub.add("org/parquet", {"data/train-00000-of-00001.parquet": file.getvalue()})
    found = read(source="org/parquet", text_field="content", held_out=0.1)
    assert found["about"]["revision"] == sha
    assert 30 < len(found["validation"]) < 120
    assert sorted(found["train"] + found["validation"]) == sorted(TEXTS)
    refused = read(source="org/parquet")["error"]
    assert refused == "data.text_field is text, which org/parquet does not have; allowed: id, content"


def test_a_directory_without_data_files_is_one_line(read, tmp_path):
    place = tmp_path / "aggregated-offline"  # neither gated nor offline
    place.mkdir()
    assert read(source=str(place))["error"] == f"data.source is {place}, {NO_TEXT}"


def test_a_connection_that_drops_twice_costs_no_document(hub, read):
    hub.add("org/shaky", C4)
    hub.cut("org/shaky", SECOND, after=len(C4[SECOND]) // 2, times=2)
    assert read(source="org/shaky", subset="en")["train"] == TRAIN
    assert hub.cuts[f"org/shaky/{SECOND}"].times == 0


@pytest.mark.parametrize(
    ("refusal", "reason"),
    [
        ((401, "GatedRepo"), "the hub no longer has it or does not show it, `hf auth login` if it is private"),
        ((404, "RepoNotFound"), "the hub no longer has it or does not show it, `hf auth login` if it is private"),
        ((429, ""), "the hub answers 429"),
        ((503, ""), "the hub answers 503"),
        ((0, ""), "Server disconnected without sending a response."),
    ],
    ids=["gated", "gone", "limited", "down", "silent"],
)
def test_a_hub_that_fails_later_is_one_line_about_the_file(hub, read, refusal, reason):
    name = f"org/later-{refusal[0]}"
    sha = hub.add(name, C4)
    assert read(source=name, subset="en")["train"] == TRAIN
    hub.repositories[name].refusal = refusal
    assert read(source=name, subset="en")["error"] == (
        f"hf://datasets/{name}@{sha}/en/c4-train.00000-of-00002.json.gz cannot be read after 0 documents: {reason}; "
        "the same command goes on from there, data.source can also be a local copy"
    )


def test_a_run_goes_on_after_a_broken_connection_and_the_next_needs_no_hub(run, own_cache):
    own = Hub()
    sha = own.add("org/c4", C4)
    own.cut("org/c4", SECOND, after=len(C4[SECOND]) // 2)
    broken = run(*TRAINED, server=own)
    assert broken.returncode == 2
    assert broken.stderr == (
        f"error: hf://datasets/org/c4@{sha}/{SECOND} cannot be read after 0 documents: Server Disconnected; "
        "the same command goes on from there, data.source can also be a local copy\n"
    )
    assert [p.name for p in own_cache.iterdir()] == ["sources"]
    own.cuts.clear()
    repaired = run(*TRAINED, server=own)
    assert (repaired.returncode, repaired.stderr) == (0, "")
    about = [json.loads(file.read_text()) for file in own_cache.glob("tokens/*/about.json")]
    assert [one["source"]["revision"] for one in about] == [sha]
    own.close()
    own.requests.clear()
    again = run(*TRAINED, "seed=1", server=own)
    assert (again.returncode, again.stderr) == (0, "")
    assert not own.requests


def test_a_tokenizer_is_fetched_once_and_kept(hub, run, own_cache):
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["</s>", "<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TRAIN, trainer)
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "pad_token": "<pad>"}
    files = {"tokenizer.json": made.to_str().encode(), "tokenizer_config.json": json.dumps(about).encode()}
    hub.add("org/tokenizer", files)
    wanted = ["data.tokenizer.kind=pretrained", "data.tokenizer.name=org/tokenizer"]
    # two jobs, both refused once their tokenizer is there
    done = run("-m", *wanted, "model.vocabulary_size=257,258")
    assert done.returncode == 2
    refused = ("error: model.vocabulary_size is 25", "and the tokenizer can emit ids up to 299; allowed: 300 or more")
    assert [all(words in line for words in refused) for line in done.stderr.splitlines()] == [True, True]
    asked = [request for request in hub.requests.elements() if request.endswith("/tokenizer.json")]
    assert len(asked) == len(set(asked)) == 2, asked  # HEAD and GET
    (place,) = (own_cache / "tokenizers").iterdir()
    kept = tokenizer.load(place)
    assert (kept.size, kept.end, kept.pad) == (300, 0, 1)
    assert kept.decode(kept.encode(TRAIN[:1])[0]) == TRAIN[0]


def test_what_the_hub_refuses_of_a_corpus_is_one_line_each(run, own_cache):
    expected = {name: line for name, (_, line) in REFUSED.items()} | {"code": NO_TEXT, "script": NO_SCRIPT}
    done = run("-m", f"data.source={','.join(f'org/{name}' for name in expected)}", "data.subset=null", *TRAINED)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [said("data.source", f"org/{name}", line) for name, line in expected.items()]
    assert not own_cache.exists()


def test_what_the_hub_refuses_of_a_tokenizer_is_one_line_each(run, own_cache, local_text):
    expected = {name: line for name, (_, line) in REFUSED.items()} | {"code": NO_TOKENIZER}
    names, setting = [f"org/{name}" for name in expected], "data.tokenizer.name"
    done = run("-m", *local_text, "data.tokenizer.kind=pretrained", f"{setting}={','.join(names)}")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [said(setting, *pair) for pair in zip(names, expected.values(), strict=True)]
    assert not own_cache.exists()


@pytest.mark.parametrize(
    ("env", "line"),
    [({"HF_ENDPOINT": "http://127.0.0.1:9"}, UNREACHED), ({"HF_HUB_OFFLINE": "1"}, OFFLINE)],
    ids=["refused", "offline"],
)
def test_no_network_is_one_line_for_a_corpus_and_for_a_tokenizer(run, own_cache, local_text, env, line):
    pretrained = ["data.tokenizer.kind=pretrained", "data.tokenizer.name=org/tokenizer"]
    done = run("-m", *local_text, "data.source=org/c4,texts.jsonl", *pretrained, **env)
    assert done.returncode == 2
    corpus, cutter = said("data.source", "org/c4", line), said("data.tokenizer.name", "org/tokenizer", line)
    assert done.stderr.splitlines() == [corpus, cutter]
    assert not own_cache.exists()


def test_what_a_repository_does_not_have_is_one_line_each(run, own_cache):
    jobs = ["data.subset=en,xx", "data.split=train,training", "data.revision=null,v7"]
    done = run("-m", *jobs, "data.text_field=content", *TRAINED)
    assert done.returncode == 2
    subset = "error: data.source is org/c4, data.subset is xx: BuilderConfig 'xx' not found. Available: ['en', 'vi']"
    revision = said("data.source", "org/c4", NO_REVISION)
    assert done.stderr.splitlines() == [
        "error: data.text_field is content, which org/c4 does not have; allowed: text, timestamp, url",
        revision,
        "error: data.split is training, which org/c4 does not have; allowed: train, validation",
        revision,
        *([subset, revision] * 2),
    ]
    assert [p.name for p in own_cache.iterdir()] == ["sources"]  # of the first: which files there are is known


def test_a_subset_that_is_not_named_is_one_line(read):
    assert read(source="org/c4")["error"] == (
        "data.source is org/c4, data.subset is null: Config name is missing. Please pick one among the available "
        "configs: ['en', 'vi']"
    )
