"""What runs of each kind take, foretold, and how near that is to what the allocator hands out; memory.py prints it.

    python experiments/benchmarks/memory_of_runs.py [--json results.json]

A kind is what is trained, and by how many processes: LLaMAs, other decoders, encoders, adapters; alone, DDP, FSDP. Of
each, two steps and an evaluation are made by the run's own code on a CPU, in processes of their own, and the bytes of
all tensors are counted by the allocator's own events as torch's profiler gives them.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bench
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

from adafrugal.memory.estimate import estimate
from adafrugal.settings import compose
from adafrugal.settings.schema import Settings
from adafrugal.training import few_steps
from adafrugal.training.distributed.ranks import Ranks

_TEXTS = ("data.fields=[text]", "data.classes=2", "eval.every=null")
_TOKENS = ("data.tokenizer.kind=pretrained", "model.pretrained=false")
REPEATS, MOST_REPEATS = 3, 12  # of what several processes take

_ENCODER = {"vocab_size": 4096, "hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 12,
            "num_hidden_layers": 6, "max_position_embeddings": 130, "pad_token_id": 1}  # fmt: skip
_GPT2 = {"vocab_size": 4096, "n_positions": 256, "n_embd": 384, "n_layer": 6, "n_head": 6}
_FINETUNE = ("task=finetune", "model=encoder", "data=labelled", "trainer.steps=4", "trainer.batch_size=8",
             "trainer.sequence_length=128")  # fmt: skip
_DECODER = ("model=decoder", "trainer.batch_size=4", "trainer.sequence_length=128")
_BF16, _FP32, _LAYERS = "trainer.precision=bf16", "trainer.precision=fp32", "trainer.activation_checkpointing=layers"
ALONE = [
    ("model=llama_20m", "optimizer=adafrugal", "trainer.batch_size=4", _BF16),
    ("model=llama_20m", "optimizer=adafrugal", "trainer.batch_size=4", _BF16, _LAYERS,
     "trainer.update_in_backward=true"),
    ("model=llama_20m", "optimizer=adamw_8bit", "trainer.batch_size=1", "trainer.sequence_length=32", _FP32),
    *((*_FINETUNE, f"optimizer={optimizer}", *more)
      for optimizer, more in (("adamw", (_FP32,)), ("adafrugal", (_BF16, "trainer.micro_batch_size=2")),
                              ("lora", (_FP32,)), ("adamw", (_BF16, _LAYERS)))),
    (*_DECODER, "optimizer=adamw", _FP32),
    (*_DECODER, "optimizer=adafrugal", _BF16),
]  # fmt: skip
_TOGETHER = ("model=llama_9m", "trainer.batch_size=8", "trainer.device=cpu")
TOGETHER = [
    (*_TOGETHER, f"trainer.parallel={parallel}", *words)
    for parallel in ("ddp", "fsdp")
    for words in (
        ("optimizer=adamw", _FP32),
        ("optimizer=adafrugal", _BF16, "trainer.micro_batch_size=2"),
    )
]


def peaks(settings: Settings, ranks: Ranks | None = None, steps: int = 2) -> tuple[int, int]:
    """Bytes that a run had at most while it made steps, from before its model is built, and in an evaluation."""
    gc.collect()  # what is freed later would be subtracted
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loop = few_steps.prepared(settings, ranks)
        for step in range(1, steps + 1):
            loop._train_step(loop.task.work(step))
        with record_function("evaluated"):
            loop.task.evaluate(last=False)
    return _most(profiler.profiler.kineto_results)


def _most(found: Any) -> tuple[int, int]:
    """The most bytes before the span "evaluated", and in it.

    What gloo's threads free the profiler does not see: it is gone by when its address is handed out again.
    """
    (begins,) = (event.start_ns() for event in found.events() if event.name() == "evaluated")
    most, live, now = [0, 0], {}, 0
    for time, address, size in sorted(_allocations(found.experimental_event_tree())):
        now -= live.pop(address, 0)
        if size > 0:
            live[address] = size
            now += size
        is_evaluating = time >= begins
        most[is_evaluating] = max(most[is_evaluating], now)
    return most[0], most[1]


def _allocations(nodes: Iterable[Any]) -> Iterator[tuple[int, int, int]]:
    """Yield the time, address and bytes of each allocation in a tree of events; a freed one has negative bytes."""
    for node in nodes:
        if node.tag == _EventType.Allocation:
            yield node.start_time_ns, node.extra_fields.ptr, node.extra_fields.alloc_size
        yield from _allocations(node.children)


def held_against(words: Sequence[str], ranks: Ranks) -> dict[str, Any]:
    """An estimate, and what a run allocates in the process that takes most.

    Of several processes the least of some measurements counts, since gloo frees its copies late, once more or less: on
    a busy machine more often, so that measurements go on while the least is above the estimate. It never falls below
    what the processes need.
    """
    settings = compose.settings(list(words))
    expected = max(estimate(settings).stages, key=lambda stage: stage.peak.total)
    both = [expected.training.total, expected.evaluation.total]
    found: list[tuple[int, int]] = []
    for number in range(1, (MOST_REPEATS if ranks.size > 1 else 1) + 1):
        found.append(peaks(settings, ranks))
        least = [min(each) for each in zip(*found, strict=True)]
        allocated = [max(each) for each in zip(*ranks.gather(least), strict=True)]
        if number >= REPEATS and all(size <= 1.01 * ours for size, ours in zip(allocated, both, strict=True)):
            break
    typed = [word for word in words if "=/" not in word and word not in (*_TEXTS, *_TOKENS)]
    return {"words": typed, "processes": ranks.size, "phase": expected.peak.phase, "estimate": both,
            "allocated": allocated}  # fmt: skip


def measured_together(runs: Sequence[Sequence[str]], processes: int = 1) -> list[dict[str, Any]]:
    """The same of some runs, one after the other, in a process that does nothing else, or in several."""
    many = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *many, __file__, "--measure", json.dumps(runs)]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[")))


def _measure(runs: Sequence[Sequence[str]]) -> None:
    """Print what was found, as one of the processes."""
    first = compose.settings(list(runs[0])).trainer
    ranks = Ranks.of_environment(first)
    ranks.join(first)
    found = [held_against(words, ranks) for words in runs]
    if ranks.first:
        print(json.dumps(found), flush=True)
    ranks.leave()


@contextmanager
def _local() -> Iterator[dict[str, list[str]]]:
    """Write an encoder and a decoder of random weights, and labelled texts; yield the words that name them, by task."""
    import transformers
    from pyarrow import Table, parquet
    from tokenizers import Tokenizer, models, pre_tokenizers

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        words = Tokenizer(models.WordLevel({"<pad>": 1, "<unk>": 0, "word": 2}, unk_token="<unk>"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", model_max_length=128
        )
        tokenizer.save_pretrained(root / "encoder")
        transformers.RobertaModel(transformers.RobertaConfig(**_ENCODER)).save_pretrained(root / "encoder")
        transformers.GPT2Config(**_GPT2).save_pretrained(root / "decoder")
        (root / "texts").mkdir()
        for split in ("train", "validation"):  # two of eight are padded
            texts = [{"text": "word " * (128 if n % 4 else 100), "label": n % 2} for n in range(8)]
            parquet.write_table(Table.from_pylist(texts), root / "texts" / f"{split}.parquet")
        places = [f"model.name={root}/encoder", f"data.source={root}/texts", f"cache_root={root}/cache"]
        tokens = [f"data.tokenizer.name={root}/decoder", *_TOKENS]
        yield {"finetune": [*_TEXTS, *places], "decoder": [f"model.name={root}/decoder", *tokens], "llama": []}


def all_kinds() -> list[dict[str, Any]]:
    """Runs of one process, and of two."""
    with _local() as local:
        runs = [[*words, *local[words[0].partition("=")[2].partition("_")[0]]] for words in ALONE]
        return [*measured_together(runs), *measured_together(TOGETHER, 2)]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """MiB foretold and handed out, in Markdown."""
    cells = []
    for row in rows:
        sizes = []
        for expected, allocated in zip(row["estimate"], row["allocated"], strict=True):
            error = f"{100 * (expected / allocated - 1):+.1f}%"
            sizes += [f"{expected / 2**20:,.0f}", f"{allocated / 2**20:,.0f}", error]
        cells.append([f"`{' '.join(row['words'])}`", str(row["processes"]), *sizes])
    each = (f"{what}: estimate, MiB | allocated, MiB | error" for what in ("training", "evaluation"))
    return bench.markdown(" | ".join(["settings", "processes", *each]), cells)


def main() -> None:
    """Measure each kind, print the table and keep what was found."""
    parser = bench.parser(__doc__.splitlines()[0])
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        _measure(json.loads(given.measure))
        return
    found = all_kinds()
    print(table(found))
    bench.keep(found, given.json)


if __name__ == "__main__":
    main()
