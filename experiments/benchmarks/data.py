"""What tokenizing and reading cost: a corpus in C4's layout, and the same repeated ten times.

    python experiments/benchmarks/data.py --source path/to/c4 --tokenizer path/to/t5-base

Prints one table as Markdown and, with --json FILE, writes the numbers. Timed in turn: the tokenizer alone in batch mode
on all cores (its own threads, and one process a core; text in memory, ids as arrays), and the preparation from files to
a whole store on the disk. Nothing else should run meanwhile.
"""

from __future__ import annotations

import os
import resource
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import bench
import numpy as np
import torch

from adafrugal.data import corpus
from adafrugal.data.corpus import Corpus
from adafrugal.data.text import sources
from adafrugal.data.text.documents import select
from adafrugal.data.text.sources import Position
from adafrugal.data.text.tokenizer import Tokenizer
from adafrugal.data.tokens.preparation import Plan, Preparation
from adafrugal.settings import compose
from adafrugal.settings.schema import Settings

CORES = len(os.sched_getaffinity(0))
BATCH = 256


def settings(source: str, tokenizer_name: str, cache: Path, *more: str) -> Settings:
    """A run on the 9M shape that reads the whole text in batches of 64 rows."""
    own = [f"data.source={source}", f"data.tokenizer.name={tokenizer_name}", f"cache_root={cache}", "tracking=local"]
    return compose.settings(["data=c4", "model=llama_9m", *own, *more])


# -- tokenizing -------------------------------------------------------------------------------------------------------


def encode(cutter: Tokenizer, texts: Sequence[str]) -> int:
    """Cut texts in batches, ids as arrays; the number of tokens."""
    batches = (cutter.encode(texts[i : i + BATCH]) for i in range(0, len(texts), BATCH))
    return sum(len(ids) for batch in batches for ids in batch)


def encode_with_threads(cutter: Tokenizer, texts: Sequence[str]) -> int:
    """The same with the tokenizers library's own threads, which need large batches."""
    found = cutter._model.encode_batch_fast(list(texts), add_special_tokens=False)
    return sum(len(np.asarray(one.ids, dtype=np.uint16)) + 1 for one in found)


def alone(cutter: Tokenizer, texts: list[str]) -> dict[str, float]:
    """Seconds of the tokenizer alone over all texts, each way."""
    seconds = {}
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    started = time.perf_counter()
    tokens = encode_with_threads(cutter, texts)
    seconds["threads"] = time.perf_counter() - started
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with ProcessPoolExecutor(CORES, get_context("spawn")) as pool:
        list(pool.map(encode, [cutter] * CORES, [texts[:1]] * CORES))  # begun before it is timed
        started = time.perf_counter()
        shares = [texts[i::CORES] for i in range(CORES)]
        assert sum(pool.map(encode, [cutter] * CORES, shares)) == tokens
        seconds["processes"] = time.perf_counter() - started
    return seconds


def prepared(plan: Plan, directory: Path) -> dict[str, float]:
    """Seconds from files to the whole store: with the start of the process, its imports and its workers, and without.

    The process is taken to have started when the validation split, which comes first, is whole.
    """
    plan = replace(plan, directory=directory, rows=None, validation_tokens=1)
    began = time.perf_counter()
    preparation = Preparation(plan, print)
    try:
        preparation.wait(lambda: plan.can_evaluate(preparation.validation))
        started = time.perf_counter()
        preparation.wait(lambda: plan.has_enough(preparation.train))
        ended = time.perf_counter()
        return {"with_start": ended - began, "prepared": ended - started}
    finally:
        preparation.close()


# -- reading ----------------------------------------------------------------------------------------------------------


def read_through(source: str, tokenizer_name: str, cache: Path, steps: int) -> dict[str, float]:
    """Read batches of 64 rows one after the other; milliseconds for each, and resident MiB before and at most."""
    wanted = settings(source, tokenizer_name, cache, f"trainer.steps={steps}", "trainer.batch_size=64")
    found = Corpus(wanted, print)
    try:
        before = resident()
        started = time.perf_counter()
        most = before
        for step in range(1, steps + 1):
            found.batches(step)
            if step % 20 == 0:
                most = max(most, resident())
        return {"ms": 1000 * (time.perf_counter() - started) / steps, "before": before, "most": most}
    finally:
        found.close()


def resident() -> float:
    """Resident memory of this process, MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def step_and_batch(source: str, tokenizer_name: str, cache: Path) -> dict[str, float]:
    """Milliseconds of a training step of the 9M model (8 rows of 128 tokens), and of making its batch."""
    from adafrugal.training.devices import open_device
    from adafrugal.training.tasks.pretrain import Pretrain

    wanted = settings(source, tokenizer_name, cache, "trainer.steps=400")
    task = Pretrain(wanted, open_device(wanted.trainer), print)
    optimizer = torch.optim.AdamW(task.model.parameters(), fused=True)
    steps, batches = [], []
    for step in range(1, 21):
        (batch,) = task.work(step).batches
        started = time.perf_counter()
        (task.loss(batch) / batch.count()).backward()
        optimizer.step()
        optimizer.zero_grad()
        steps.append(time.perf_counter() - started)
    for step in range(100, 400):
        started = time.perf_counter()
        task._corpus._batches[step]
        batches.append(time.perf_counter() - started)
    task.close()
    return {"step": 1000 * statistics.median(steps), "batch": 1000 * statistics.median(batches)}


def ten_times(source: Path, place: Path) -> Path:
    """A directory in C4's layout that has each training file ten times."""
    (place / "en").mkdir(parents=True)
    (place / "README.md").write_text((source / "README.md").read_text())
    for file in sorted((source / "en").iterdir()):
        copies = 10 if "train" in file.name else 1
        for number in range(copies):
            stem, dot, rest = file.name.partition(".json")
            name = f"{stem}{number}{dot}{rest}" if copies > 1 else file.name
            (place / "en" / name).symlink_to(file.resolve())
    return place


def table(found: dict[str, float]) -> str:
    """The numbers as Markdown."""
    megabytes = found["bytes"] / 1e6
    fastest = min(found["threads"], found["processes"])
    rows = [
        ("the tokenizer alone, its own threads", f"{megabytes / found['threads']:.2f} MB/s"),
        ("the tokenizer alone, one process a core", f"{megabytes / found['processes']:.2f} MB/s"),
        ("from files to a whole store, once started", f"{megabytes / found['prepared']:.2f} MB/s"),
        ("÷ the faster one alone", f"{fastest / found['prepared']:.0%}"),
        ("starting (Python, `datasets`, the workers)", f"{found['with_start'] - found['prepared']:.1f} s"),
        ("ten times the text, from the start", f"{10 * megabytes / found['with_start_10']:.2f} MB/s"),
        ("÷ the faster one alone", f"{10 * fastest / found['with_start_10']:.0%}"),
        ("making a batch of 8 rows", f"{found['batch']:.2f} ms"),
        ("÷ a training step of the 9M model", f"{found['batch'] / found['step']:.2%}"),
        ("resident memory, reading all rows", f"{found['before']:.0f} MiB → at most {found['most']:.0f} MiB"),
        ("the same, ten times the text", f"{found['before_10']:.0f} MiB → at most {found['most_10']:.0f} MiB"),
    ]
    return bench.markdown("what | measured", rows)


def main() -> None:
    """Measure and print."""
    parser = bench.parser(__doc__)
    parser.add_argument("--source", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        cache = Path(scratch) / "cache"
        plan = corpus.locate(settings(given.source, given.tokenizer, cache), print)
        source = plan.source
        bundles = sources.read(source, source.train, Position())
        texts = [text for pieces, _ in bundles for text in select(pieces, source.train.rules)[0]]
        found: dict[str, float] = {"bytes": sum(len(text.encode()) for text in texts), "documents": len(texts)}
        rounds = []
        for number in range(given.rounds):
            place = Path(scratch) / f"store{number}"
            rounds.append(alone(plan.tokenizer, texts) | prepared(plan, place))
        found |= {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
        many = ten_times(Path(given.source), Path(scratch) / "c4x10")
        ten = corpus.locate(settings(str(many), given.tokenizer, cache), print)
        found |= {f"{name}_10": seconds for name, seconds in prepared(ten, ten.directory).items()}
        found |= step_and_batch(given.source, given.tokenizer, cache)
        steps = len(texts) // 64
        with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
            for name, where, count in (("", given.source, steps), ("_10", str(many), 10 * steps)):
                read = pool.submit(read_through, where, given.tokenizer, cache, count).result()
                found |= {f"{key}{name}": value for key, value in read.items()}
    print(table(found))
    bench.keep({"machine": {"cores": CORES, "torch": torch.__version__}, "measured": found}, given.json)


if __name__ == "__main__":
    main()
