"""Text and tokenizers from the hub, through the real clients: they ask a server on this machine, see hub.py."""

import io
import json
import random

import pyarrow
import pytest
import tokenizers
from corpora import CARD, zipped
from hub import REFUSALS
from pyarrow import parquet

from adafrugal.data.text import tokenizer

TEXTS = [f"The matrix {n} holds {n * n % 97} columns, and the token {n % 13} reads them." for n in range(700)]
TRAIN, VALIDATION = TEXTS[:600], TEXTS[600:]
SECOND = "en/c4-train.00001-of-00002.json.gz"
LOCAL = "or copy it to this machine and set {setting} to that directory"
GATED = f"which is gated: ask for access on its page at the hub, then `hf auth login` (or set HF_TOKEN), {LOCAL}"
HIDDEN = f"which the hub does not have or does not show: check the name, `hf auth login` if it is private, {LOCAL}"
UNREACHED = f"and the hub cannot be reached: check the network, {LOCAL}"
OFFLINE = f"but HF_HUB_OFFLINE is set: unset it, {LOCAL}"
NO_TEXT = "which has no data files that datasets can read"
NO_TOKENIZER = (
    "which has no tokenizer that transformers can read without code or packages of its own; allowed: tokenizers with a "
    "tokenizer.json"
)
NO_REVISION = "which has no such data.revision; allowed: a branch, a tag or a commit's sha"
# repository -> the message; the last three are not there, whatever their names mean
SAID = {
    "asks": GATED,
    "waits": GATED,
    "forbids": HIDDEN,
    "gone": HIDDEN,
    "limited": f"and the hub limits the rate of requests (429): wait, `hf auth login`, {LOCAL}",
    "down": f"and the hub has an error of its own (503): try again later, {LOCAL}",
    "silent": UNREACHED,
    "unknown": HIDDEN,
    "aggregated": HIDDEN,
    "offline": HIDDEN,
}
TRAINED = ["data.tokenizer.kind=train", "data.tokenizer.name=null", "data.tokenizer.vocabulary_size=300"]
READER = """
import json
from pathlib import Path
from adafrugal.settings.schema import CorpusSettings
from adafrugal.system.errors import SettingError
from adafrugal.data.text import documents, sources
for settings in {settings!r}:
    try:
        source = sources.resolve(CorpusSettings(**settings), Path({cache_root!r}), str)
        found = {{"about": source.described(), "fingerprint": source.fingerprint}}
        for name, split in (("train", source.train), ("validation", source.validation)):
            bundles = sources.read(source, split, sources.Position())
            found[name] = [text for pieces, _ in bundles for text in documents.select(pieces, split.rules)[0]]
    except SettingError as error:
        found = {{"error": str(error)}}
    print(json.dumps(found), flush=True)
raise SystemExit(0)
"""
C4 = {
    "README.md": CARD.removesuffix("---\n").encode() + b"- config_name: vi\n  data_files: vi/*.json.gz\n---\n",
    "en/c4-train.00000-of-00002.json.gz": zipped(TRAIN[:300]),
    SECOND: zipped(TRAIN[300:]),
    "en/c4-validation.00000-of-00001.json.gz": zipped(VALIDATION),
    "vi/c4-train.00000-of-00001.json.gz": zipped(["Ma trận có các cột."]),
}


@pytest.fixture(scope="module", autouse=True)
def repositories(hub):
    hub.add("org/c4", C4)
    hub.add("org/script", {"README.md": b"a script\n", "script.py": b"import datasets\n"})
    hub.add("org/code", {"README.md": b"no data\n", "main.c": b"int main(void) {}\n"})


@pytest.fixture(scope="module")
def read_all(hub_forks, tmp_path_factory):
    """A function that reads sources in another process: settings of each -> what it found, or its error."""
    cache_root = str(tmp_path_factory.mktemp("reader"))

    def ask(*settings, before=""):
        done = hub_forks(before=before + READER.format(settings=settings, cache_root=cache_root))
        assert done.code == 0, done.err
        return [json.loads(line) for line in done.out.splitlines()]

    return ask


@pytest.fixture(scope="module")
def read(read_all):
    """The same for one: its settings -> what it found, or its error."""
    return lambda **settings: read_all(settings)[0]


@pytest.fixture
def run(hub_forks, tmp_path):
    """A function that runs train.py with the hub and a cache of its own: overrides -> the finished process."""
    words = ["scale=smoke", "tracking=local", f"run_root={tmp_path / 'runs'}", f"cache_root={tmp_path / 'own'}"]
    words += ["data=c4", "data.source=org/c4", "model=llama_tiny", "data.processes=1", "trainer.steps=2"]
    return lambda *overrides, **how: hub_forks(*words, *overrides, cwd=tmp_path, **how)


@pytest.fixture
def local_text(tmp_path):
    """Settings of a corpus that needs no hub, relative to where `run` runs."""
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return ["data=text", "data.source=texts.jsonl"]


def said(setting, name, line):
    return f"error: {setting} is {name}, {line.format(setting=setting)}"


def test_a_repository_is_read_in_order_at_its_commit_and_a_newer_one_only_when_asked_for(hub, read):
    old = hub.add("org/growing", C4)
    found = read(source="org/growing", subset="en")
    assert (found["train"], found["validation"]) == (TRAIN, VALIDATION)
    assert found["about"]["revision"] == old and found["about"]["files"] == {"train": 2, "validation": 1}
    assert hub.add("org/growing", {**C4, SECOND: zipped(["newer"])}) != old
    card = "HEAD /datasets/org/growing/resolve/main/README.md"
    asked = hub.requests[card]
    assert f"@{old}/" in read(source="org/growing", subset="en")["error"]  # which this server no longer has
    assert hub.requests[card] == asked
    newer = read(source="org/growing", subset="en", revision="main")
    assert newer["train"] == [*TRAIN[:300], "newer"] and newer["fingerprint"] != found["fingerprint"]


def test_parquet_files_without_a_card_are_held_out_by_hash(hub, read_all):
    file = io.BytesIO()
    parquet.write_table(pyarrow.table({"id": range(len(TEXTS)), "content": TEXTS}), file, row_group_size=100)
    sha = hub.add("org/parquet", {"data/train-00000-of-00001.parquet": file.getvalue()})
    own = {"source": "org/parquet", "held_out": 0.1}
    found, refused = read_all({**own, "text_field": "content"}, own)
    assert found["about"]["revision"] == sha and 30 < len(found["validation"]) < 120
    assert sorted(found["train"] + found["validation"]) == sorted(TEXTS)
    assert refused["error"] == "data.text_field is text, which org/parquet does not have; allowed: id, content"


def test_a_directory_without_data_files_is_one_line(read, tmp_path):
    directory = tmp_path / "aggregated-offline"  # neither gated nor offline
    directory.mkdir()
    assert read(source=str(directory))["error"] == f"data.source is {directory}, {NO_TEXT}"


def test_a_connection_that_drops_eight_times_costs_no_document(hub, read):
    digits = random.Random(0)
    texts, name = [f"{digits.getrandbits(40_000):x}" for _ in range(2000)], "data/train-00000-of-00001.json.gz"
    content = zipped(texts)
    hub.add("org/shaky", {name: content})
    hub.cut("org/shaky", name, after=len(content) // 2, times=8)
    assert read(source="org/shaky", held_out=1e-9)["train"] == texts
    assert hub.cuts[f"org/shaky/{name}"][1] == 0


def test_a_hub_that_fails_later_is_one_line_about_the_file(hub, read_all):
    no_longer = "the hub no longer has it or does not show it, `hf auth login` if it is private"
    reasons = {
        "asks": no_longer, "gone": no_longer, "limited": "the hub answers 429", "down": "the hub answers 503",
        "silent": "Server disconnected without sending a response.",
    }  # fmt: skip
    wanted = [{"source": f"org/later-{how}", "subset": "en"} for how in reasons]
    shas = [hub.add(one["source"], C4) for one in wanted]
    assert all(found["train"] == TRAIN for found in read_all(*wanted))
    for how in reasons:
        hub.repositories[f"org/later-{how}"].refusal = REFUSALS[how]
    assert [found["error"] for found in read_all(*wanted)] == [
        f"hf://datasets/org/later-{how}@{sha}/en/c4-train.00000-of-00002.json.gz cannot be read after 0 documents: "
        f"{reason}; the same command goes on from there, data.source can also be a local copy"
        for sha, (how, reason) in zip(shas, reasons.items(), strict=True)
    ]


def test_a_run_goes_on_after_a_broken_connection_and_the_next_needs_no_hub(hub, run, tmp_path):
    own = ["data.source=org/broken", *TRAINED]
    sha = hub.add("org/broken", C4)
    hub.cut("org/broken", SECOND, after=len(C4[SECOND]) // 2)
    broken = run(*own)
    assert broken.code == 2
    assert broken.err == (
        f"error: hf://datasets/org/broken@{sha}/{SECOND} cannot be read after 0 documents: Server Disconnected; "
        "the same command goes on from there, data.source can also be a local copy\n"
    )
    assert [p.name for p in (tmp_path / "own").iterdir()] == ["sources"]
    hub.cuts.clear()
    repaired = run(*own)
    assert (repaired.code, repaired.err) == (0, "")
    about = [json.loads(file.read_text()) for file in (tmp_path / "own").glob("tokens/*/about.json")]
    assert [one["source"]["revision"] for one in about] == [sha]
    before = hub.requests.copy()
    again = run(*own, "seed=1")
    assert (again.code, again.err) == (0, "")
    assert hub.requests == before


def test_a_tokenizer_is_fetched_once_and_kept(hub, run, tmp_path):
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
    assert done.code == 2
    refused = ("error: model.vocabulary_size is 25", "and the tokenizer can emit ids up to 299; allowed: 300 or more")
    assert [all(words in line for words in refused) for line in done.err.splitlines()] == [True, True]
    asked = [name for name in hub.requests.elements() if "org/tokenizer/" in name and name.endswith("/tokenizer.json")]
    assert len(asked) == len(set(asked)) == 2, asked  # HEAD and GET
    (directory,) = (tmp_path / "own" / "tokenizers").iterdir()
    kept = tokenizer.load(directory)
    assert (kept.size, kept.end, kept.pad) == (300, 0, 1)
    assert kept.decode(kept.encode(TRAIN[:1])[0]) == TRAIN[0]


def test_a_refused_corpus_is_one_line(read_all):
    script = "data.subset is null: Dataset scripts are no longer supported, but found script.py"
    expected = {**SAID, "code": NO_TEXT, "script": script}
    found = read_all(*({"source": f"org/{name}"} for name in expected))
    assert [f"error: {one['error']}" for one in found] == [
        said("data.source", f"org/{name}", line) for name, line in expected.items()
    ]


def test_a_refused_tokenizer_is_one_line_each(run, tmp_path, local_text):
    expected = {**{name: SAID[name] for name in ("asks", "gone", "limited", "down", "silent")}, "code": NO_TOKENIZER}
    names, setting = [f"org/{name}" for name in expected], "data.tokenizer.name"
    done = run("-m", *local_text, "data.tokenizer.kind=pretrained", f"{setting}={','.join(names)}")
    assert done.code == 2
    assert done.err.splitlines() == [said(setting, *pair) for pair in zip(names, expected.values(), strict=True)]
    assert not (tmp_path / "own").exists()


REFUSED = """
import socket
def refuse(*_, **how): raise ConnectionRefusedError(111, "Connection refused")
socket.create_connection = refuse
"""
IS_OFFLINE = """
import datasets
from huggingface_hub import constants
constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True  # as read from the environment
"""


@pytest.mark.parametrize(("before", "line"), [(REFUSED, UNREACHED), (IS_OFFLINE, OFFLINE)], ids=["refused", "offline"])
def test_no_network_is_one_line_for_a_corpus_and_for_a_tokenizer(run, local_text, tmp_path, before, line):
    pretrained = ["data.tokenizer.kind=pretrained", "data.tokenizer.name=org/unknown"]
    done = run("-m", *local_text, "data.source=org/c4,texts.jsonl", *pretrained, before=before)
    assert done.code == 2
    corpus, cutter = said("data.source", "org/c4", line), said("data.tokenizer.name", "org/unknown", line)
    assert done.err.splitlines() == [corpus, cutter]
    assert not (tmp_path / "own").exists()


def test_a_missing_subset_split_or_revision_is_one_line_each(read_all):
    c4 = {"source": "org/c4", "subset": "en"}
    wrong = [{"revision": "v7"}, {"split": "training"}, {"subset": "xx"}, {"subset": None}]
    assert [found["error"].removeprefix("data.") for found in read_all(*({**c4, **one} for one in wrong))] == [
        f"source is org/c4, {NO_REVISION}",
        "split is training, which org/c4 does not have; allowed: train, validation",
        "source is org/c4, data.subset is xx: BuilderConfig 'xx' not found. Available: ['en', 'vi']",
        "source is org/c4, data.subset is null: Config name is missing. Please pick one among the available "
        "configs: ['en', 'vi']",
    ]
