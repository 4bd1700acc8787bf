"""Make a run's data from its settings: source, tokenizer, stored tokens and batches."""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from adafrugal.data.batches import Prefetched, TrainingBatches, unigram_loss, validation
from adafrugal.data.rows import Layout
from adafrugal.data.text import faults, sources, tokenizer
from adafrugal.data.text.documents import digest
from adafrugal.data.text.sources import Source
from adafrugal.data.text.tokenizer import PretrainedTokenizer, SentencePieceTokenizer, Tokenizer
from adafrugal.data.tokens.preparation import Plan, Preparation
from adafrugal.settings.canonical import trained_size
from adafrugal.settings.schema import CorpusSettings, Settings
from adafrugal.system import files
from adafrugal.system.errors import SettingError

FORMAT = 1  # version of the shards' format; part of a store's name
SHARDS_IN_WINDOW = 4


class Corpus:
    """A run's training batches by step, and its validation rows.

    Args:
        settings: of the run.
        say: called with a line about work that takes long.
        state: the `state_dict` of the interrupted run to continue.
        processes: number of processes that share each evaluation batch.
        pin: see `Prefetched`.

    Raises:
        SettingError: a missing or broken input; the message is one line.
    """

    def __init__(
        self, settings: Settings, say: Callable[[str], None], state: dict[str, Any] | None = None, processes: int = 1,
        pin: bool = False,
    ) -> None:  # fmt: skip
        trainer = settings.trainer
        self.plan = plan = locate(settings, say)
        if state:
            faults.refuse_other_data(state["fingerprint"], plan.fingerprint)
        self._preparation = preparation = Preparation(plan, say)
        try:
            preparation.wait(lambda: plan.can_evaluate(preparation.validation))
            self._batches = TrainingBatches(
                plan, preparation, settings.data_seed, trainer.batch_size, trainer.steps, settings.data.repeat
            )
            each = -(-trainer.batch_size // processes)  # rows of a step per process
            rows = min(trainer.micro_batch_size or each, each) * processes
            self.validation, self.last_validation = (
                validation(preparation.validation.shards(), plan.layout, tokens, rows)
                for tokens in (settings.eval.tokens, settings.eval.last_tokens or settings.eval.tokens)
            )
            self._state = state or {}
        except BaseException:
            preparation.close()
            raise
        self.batches = Prefetched(self._batches, trainer.steps, pin)
        self.epochs = self._batches.epochs

    @cached_property
    def unigram_loss(self) -> float:
        """The loss of a unigram model of the first window, which an evaluation alone need not wait for."""
        if "unigram_loss" in self._state:
            return self._state["unigram_loss"]
        return unigram_loss(self._batches.window(0).shards, self.plan.tokenizer.size, self.last_validation.batches)

    @property
    def about(self) -> dict[str, Any]:
        """The identity of the data, and the amount that is prepared."""
        plan, train, held_out = self.plan, self._preparation.train, self._preparation.validation
        return {
            "fingerprint": plan.fingerprint,
            "source": plan.source.described(),
            "tokenizer": {"size": plan.tokenizer.size, "fingerprint": plan.tokenizer.fingerprint},
            "train": train.counts() | {"complete": self._batches.total() is not None},
            "validation": held_out.counts() | {"complete": held_out.ended},
        }

    def state_dict(self) -> dict[str, Any]:
        """Return plain values for a run that continues this one. Batches depend on the step, so need no position."""
        return {"fingerprint": self.plan.fingerprint, "unigram_loss": self.unigram_loss}

    def close(self) -> None:
        """Stop preparing tokens and making batches."""
        self._preparation.close()
        self.batches.close()


def locate(settings: Settings, say: Callable[[str], None]) -> Plan:
    """Find the source, load or train the tokenizer, and plan the tokens, without encoding any.

    Raises:
        SettingError: the source or tokenizer is missing, or its ids exceed the model's vocabulary.
    """
    data, trainer = settings.data, settings.trainer
    cache_root = Path(settings.cache_root).absolute()
    source = sources.resolve(data, cache_root, say)
    cutter = _tokenizer(settings, source, cache_root / "tokenizers", say)
    if cutter.size > (settings.model.vocabulary_size or cutter.size):
        larger = f"{cutter.size:,} or more (model=llama_9m and larger have 32,000); or data.tokenizer.kind=train for a "
        larger += "smaller tokenizer"
        own = "the decoder's own tokenizer: data.tokenizer.kind=pretrained data.tokenizer.name=…"
        raise SettingError(
            f"model.vocabulary_size is {settings.model.vocabulary_size:,}, and the tokenizer can emit ids up to "
            f"{cutter.size - 1:,}; allowed: {own if settings.model.kind == 'decoder' else larger}"
        )
    packed = data.rows == "packed"
    fingerprint = hashlib.sha256(source.fingerprint.encode() + cutter.serialized).hexdigest()
    shard_tokens, limit = data.window_tokens // SHARDS_IN_WINDOW, data.store_limit_gib
    return Plan(
        directory=_store(cache_root / "tokens", source, digest([fingerprint, shard_tokens, FORMAT])[:12]),
        source=source,
        tokenizer=cutter,
        layout=Layout(trainer.sequence_length, packed, data.mask_documents, cutter.end, cutter.pad),
        fingerprint=fingerprint,
        shard_tokens=shard_tokens,
        window=SHARDS_IN_WINDOW,
        rows=trainer.steps * trainer.batch_size,
        validation_tokens=max(settings.eval.tokens, settings.eval.last_tokens or 0),
        limit=None if limit is None else int(limit * 2**30),
        processes=data.processes or len(os.sched_getaffinity(0)),
    )


def _store(root: Path, source: Source, key: str) -> Path:
    """Return the directory of a text's tokens. It is known by its key, under any name that an older version gave it."""
    known = sorted(root.glob(f"*-{key}"))
    return known[0] if known else root / f"{_name(source)}-{key}"


def _name(source: Source) -> str:
    """Return the name that tells a text: of its file, or of the directory or repository of several."""
    file, given = Path(source.train.files[0]), Path(source.name)
    if given.is_file() or "packages" in source.about:  # the embedded text
        return _plain(file.name.split(".")[0])
    above = list(itertools.takewhile(lambda part: not glob.has_magic(part), given.parts))
    return _plain(above[-1] if above else file.absolute().parent.name)


def _tokenizer(settings: Settings, source: Source, root: Path, say: Callable[[str], None]) -> Tokenizer:
    """Load, fetch or train the run's tokenizer; keep a fetched or trained one in a directory named by its inputs."""
    wanted, name = settings.data.tokenizer, str(settings.data.tokenizer.name)
    if wanted.kind == "sentencepiece":
        try:
            return SentencePieceTokenizer(Path(name).read_bytes())
        except OSError as error:
            line = f"data.tokenizer.name is {name}: {error.strerror}; allowed: a SentencePiece .model file"
            raise SettingError(line) from error
    if wanted.kind == "pretrained":
        is_local, directory = Path(name).exists(), root / f"{_plain(name)}-{digest(name)[:12]}"
        if not is_local and directory.is_dir():
            return tokenizer.load(directory)
        if not is_local:
            say(f"asking the hub for the tokenizer {name}, once")
        with faults.of_hub("data.tokenizer.name", name):
            found = PretrainedTokenizer.of_transformers(name)
        return found if is_local else _kept(found, directory)
    size = trained_size(settings)
    made_of = [asdict(wanted) | {"vocabulary_size": size}, source.fingerprint]
    directory = root / f"{wanted.model_type}-{size}-{digest(made_of)[:12]}"
    if directory.is_dir():
        return tokenizer.load(directory)
    if isinstance(settings.data, CorpusSettings):
        say(f"training a tokenizer of {size:,} pieces on {source.name}, once → {directory}")
    documents = list(sources.sample(source, wanted.sample_bytes))  # SentencePiece hides reading errors
    return _kept(tokenizer.train(documents, size, wanted.model_type, wanted.byte_fallback), directory)


def _kept(found: Tokenizer, directory: Path) -> Tokenizer:
    with faults.of_disk(directory.parent), files.made(directory) as scratch:
        found.save(scratch)
    return found


def _plain(name: str) -> str:
    """Convert a name to at most 40 characters that a directory's name may have."""
    words = "".join(c if c.isalnum() or c in "-_." else " " for c in name).split()
    return "-".join(words)[-40:].strip("-.") or "text"
