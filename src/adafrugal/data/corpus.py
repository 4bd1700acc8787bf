"""From settings to batches: the source, its tokenizer, its tokens, and what a run reads of them."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adafrugal.data.batches import Prefetched, TrainingBatches, Validation, validation
from adafrugal.data.rows import Layout
from adafrugal.data.text import faults, sources, tokenizer
from adafrugal.data.text.sources import Position, Source
from adafrugal.data.text.tokenizer import PretrainedTokenizer, SentencePieceTokenizer, Tokenizer
from adafrugal.data.tokens.preparation import Plan, Preparation
from adafrugal.data.tokens.store import Entry
from adafrugal.data.tokens.windows import StoredWindows, StreamedWindows
from adafrugal.data.unigram import unigram_loss
from adafrugal.settings.canonical import trained_size
from adafrugal.settings.schema import CorpusSettings, Settings
from adafrugal.system import files
from adafrugal.system.errors import SettingError

FORMAT = 1  # of shards; part of a store's name
SHARDS_IN_WINDOW = 4


@dataclass(frozen=True)
class Tokens:
    """What a store is made of and where it is.

    Args:
        source: of the documents.
        tokenizer: that cuts them.
        layout: of the rows.
        plan: of the preparation that the run needs.
        fingerprint: the same documents cut by the same tokenizer have the same.
    """

    source: Source
    tokenizer: Tokenizer
    layout: Layout
    plan: Plan
    fingerprint: str


def locate(settings: Settings, say: Callable[[str], None]) -> Tokens:
    """Find the source, and find or train the tokenizer; nothing is cut into tokens yet.

    Raises:
        SettingError: the source or the tokenizer is not there, or its ids do not fit the model.
    """
    data, trainer = settings.data, settings.trainer
    cache_root = Path(settings.cache_root).absolute()
    source = sources.resolve(data, cache_root, say)
    cutter, tokenizer_at = _tokenizer(settings, source, cache_root, say)
    if cutter.size > settings.model.vocabulary_size:
        raise SettingError(
            f"model.vocabulary_size is {settings.model.vocabulary_size:,}, and the tokenizer can emit ids up to "
            f"{cutter.size - 1:,}; allowed: {cutter.size:,} or more (model=llama_9m and larger have 32,000); or "
            "data.tokenizer.kind=train for a smaller tokenizer"
        )
    layout = Layout(
        trainer.sequence_length, data.rows == "packed", data.mask_documents, cutter.end, cutter.pad
    )  # fmt: skip
    fingerprint = hashlib.sha256(source.fingerprint.encode() + cutter.serialized).hexdigest()
    shard_tokens, limit = data.window_tokens // SHARDS_IN_WINDOW, data.store_limit_gib
    name = _plain(Path(source.train.files[0]).name.split(".")[0])  # not as typed: paths differ for the same text
    plan = Plan(
        directory=cache_root / "tokens" / f"{name}-{_digest([fingerprint, shard_tokens, FORMAT])[:12]}",
        source=source,
        tokenizer_at=tokenizer_at,
        layout=layout,
        shard_tokens=shard_tokens,
        window=SHARDS_IN_WINDOW,
        rows=trainer.steps * trainer.batch_size,
        validation_tokens=max(settings.eval.tokens, settings.eval.last_tokens or 0),
        limit=None if limit is None else int(limit * 2**30),
        processes=data.processes or len(os.sched_getaffinity(0)),
        streamed=not data.store,
    )
    return Tokens(source, cutter, layout, plan, fingerprint)


def prepare(tokens: Tokens, say: Callable[[str], None]) -> None:
    """Prepare what the plan needs, without a run; returns when it is there.

    Raises:
        SettingError: a missing or broken input.
    """
    if _is_there(tokens, say):
        return
    plan = tokens.plan
    train, held_out = plan.parts()
    preparation = Preparation(plan, Position(), say)
    try:
        preparation.wait(
            lambda: plan.can_evaluate(held_out) and plan.has_enough(train),
            lambda: f"{sum(entry.tokens for entry in train.entries):,} so far",
        )
    finally:
        preparation.close()


class Corpus:
    """What a run reads: training batches by step, and validation rows.

    Args:
        settings: of the run.
        say: told what takes long, in a sentence.
        state: where the training goes on, as `state_dict` gave it.
        processes: that share the rows of an evaluation's batch.
        pin: put training batches into pinned memory, from which a GPU copies without waiting.

    Raises:
        SettingError: a missing or broken input; the message is one line.
    """

    def __init__(
        self,
        settings: Settings,
        say: Callable[[str], None],
        state: dict[str, Any] | None = None,
        processes: int = 1,
        pin: bool = False,
    ) -> None:
        data, trainer = settings.data, settings.trainer
        self.tokens = tokens = locate(settings, say)
        plan, layout = tokens.plan, tokens.layout
        if state:
            faults.refuse_other_data(state["fingerprint"], tokens.fingerprint)
        _is_there(tokens, say)
        go_on = (state or {}).get("batches")
        if data.store:
            self._windows = StoredWindows(plan, data.repeat, say)
        else:
            self._windows = StreamedWindows(plan, data.repeat, say, go_on)
        try:
            self._batches = TrainingBatches(
                self._windows, layout, settings.seed, trainer.batch_size, trainer.steps, data.repeat,
                None if data.store else go_on,
            )  # fmt: skip
            each = -(-trainer.batch_size // processes)  # rows of a step that a process has
            rows = min(trainer.micro_batch_size or each, each)
            sizes = settings.eval.tokens, settings.eval.last_tokens or settings.eval.tokens
            self.validation, self.last_validation = (self._rows(layout, tokens, rows * processes) for tokens in sizes)
            self.unigram_loss: float = (state or {}).get("unigram_loss") or self._unigram_loss()
        except BaseException:
            self._windows.close()
            raise
        self.batches = Prefetched(self._batches, trainer.steps, go_on, pin)

    @property
    def about(self) -> dict[str, Any]:
        """What identifies the data, and how much of it is there."""
        plan = self.tokens.plan
        found: dict[str, Any] = {"fingerprint": self.tokens.fingerprint, "source": self.tokens.source.described()}
        found["tokenizer"] = {"size": self.tokens.tokenizer.size, "fingerprint": self.tokens.tokenizer.fingerprint}
        _, validation = plan.parts()
        found["train"] = _counts(self._windows.entries()) | {"complete": self._windows.total() is not None}
        found["validation"] = _counts(validation.entries) | {"complete": validation.ended}
        return found

    def epochs(self, steps: int) -> float | None:
        """How often the training text has been read after so many steps; None where its length is not known yet."""
        return self._batches.epochs(steps)

    def state_dict(self) -> dict[str, Any]:
        """Plain values from which the step after the last batch is read, without reading what was before it."""
        return {
            "batches": self.batches.state,
            "fingerprint": self.tokens.fingerprint,
            "unigram_loss": self.unigram_loss,
        }

    def close(self) -> None:
        """End what works in the background."""
        self._windows.close()
        self.batches.close()

    def _rows(self, layout: Layout, tokens: int, micro_batch: int) -> Validation:
        part = self._windows.validation
        return validation([part.open(number) for number in range(len(part.entries))], layout, tokens, micro_batch)

    def _unigram_loss(self) -> float:
        """Of the first window's token frequencies, on the validation rows that the run ends with."""
        train = [shard.tokens for shard in self._batches.first_window().shards]
        return unigram_loss(train, self.tokens.tokenizer.size, self.last_validation.batches)


def _counts(entries: Sequence[Entry]) -> dict[str, Any]:
    return {
        "documents": sum(entry.documents for entry in entries),
        "tokens": sum(entry.tokens for entry in entries),
        "bytes": sum(entry.text_bytes for entry in entries),
        "skipped": dict(sum((Counter(entry.skipped) for entry in entries), Counter[str]())),
    }


def _is_there(tokens: Tokens, say: Callable[[str], None]) -> bool:
    """Whether all that the plan needs is prepared; if not, it is said, and the store is there to be filled."""
    plan = tokens.plan
    train, held_out = plan.parts()
    _describe(tokens)
    if plan.has_enough(train) and plan.can_evaluate(held_out):
        return True
    say(f"preparing tokens of {tokens.source.name} → {plan.directory}")
    return False


def _describe(tokens: Tokens) -> None:
    """Leave in a new store what it is made of, for people."""
    directory = tokens.plan.directory
    if not directory.is_dir():
        with files.made(directory) as scratch:
            tokens.tokenizer.save(scratch)
            about = {
                "fingerprint": tokens.fingerprint,
                "source": tokens.source.described(),
                "tokenizer": tokens.tokenizer.fingerprint,
            }
            (scratch / "about.json").write_text(json.dumps(about, indent=2) + "\n")


def _tokenizer(
    settings: Settings, source: Source, cache_root: Path, say: Callable[[str], None]
) -> tuple[Tokenizer, Path]:
    """The run's tokenizer and its directory, named by what it depends on; made or fetched the first time."""
    wanted = settings.data.tokenizer
    if wanted.kind == "sentencepiece":
        return _kept(_of_file(str(wanted.name)), "sentencepiece", cache_root)
    if wanted.kind == "pretrained" and Path(str(wanted.name)).exists():
        with faults.of_hub("data.tokenizer.name", str(wanted.name)):
            return _kept(PretrainedTokenizer.of_transformers(str(wanted.name)), "pretrained", cache_root)
    if wanted.kind == "pretrained":
        place = cache_root / "tokenizers" / f"{_plain(str(wanted.name))}-{_digest(wanted.name)[:12]}"
        if not place.is_dir():
            say(f"asking the hub for the tokenizer {wanted.name}, once")
            with faults.of_hub("data.tokenizer.name", str(wanted.name)):
                fetched = PretrainedTokenizer.of_transformers(str(wanted.name))
            with files.made(place) as scratch:
                fetched.save(scratch)
        return tokenizer.load(place), place
    size = trained_size(settings)
    made_of = [asdict(wanted) | {"vocabulary_size": size}, source.fingerprint]
    place = cache_root / "tokenizers" / f"{wanted.model_type}-{size}-{_digest(made_of)[:12]}"
    if not place.is_dir():
        if isinstance(settings.data, CorpusSettings):
            say(f"training a tokenizer of {size:,} pieces on {source.name}, once → {place}")
        documents = list(sources.sample(source, wanted.sample_bytes))  # SentencePiece would hide what reading raises
        trained = tokenizer.train(documents, size, wanted.model_type, wanted.byte_fallback)
        with files.made(place) as scratch:
            trained.save(scratch)
    return tokenizer.load(place), place


def _of_file(name: str) -> SentencePieceTokenizer:
    try:
        return SentencePieceTokenizer(Path(name).read_bytes())
    except OSError as error:
        raise SettingError(
            f"data.tokenizer.name is {name}: {error.strerror}; allowed: a SentencePiece .model file"
        ) from error


def _kept(found: Tokenizer, kind: str, cache_root: Path) -> tuple[Tokenizer, Path]:
    """A tokenizer read from local files, with a copy that worker processes and later runs read."""
    place = cache_root / "tokenizers" / f"{kind}-{found.fingerprint[:12]}"
    if not place.is_dir():
        with files.made(place) as scratch:
            found.save(scratch)
    return found, place


def _plain(name: str) -> str:
    """A name that can be a directory's."""
    words = "".join(c if c.isalnum() or c in "-_." else " " for c in name).split()
    return "-".join(words)[-40:].strip("-.") or "text"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
