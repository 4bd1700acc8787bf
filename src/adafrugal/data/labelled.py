"""Labelled sentences and pairs: read, cut into tokens, and put into batches of about equal lengths."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from adafrugal.config import LabelledSettings, SettingError
from adafrugal.data import faults

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

ALIKE = 50  # batches whose examples are sorted by length together
PART_KEY = 0x5EED  # of the permutation whose beginning `data.examples` takes


@dataclass(frozen=True)
class Batch:
    """Examples, padded to the longest of them.

    Args:
        tokens: int64 [examples, length].
        mask: int64 [examples, length], 1 where there is a token and 0 where there is padding.
        labels: [examples], int64 classes or float32 scores.
        types: int64 [examples, length], which sentence of a pair a token is of; None where the model takes none.
    """

    tokens: Tensor
    mask: Tensor
    labels: Tensor
    types: Tensor | None = None

    def count(self) -> int:
        """The number of examples, over which the loss is averaged."""
        return len(self.labels)

    def real_tokens(self) -> int:
        """The number of tokens that are no padding."""
        return int(self.mask.sum())

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; from pinned memory without waiting where that is a GPU."""
        if device.type != "cuda":
            return self
        tensors = (self.tokens, self.mask, self.labels, self.types)
        return Batch(*(None if t is None else t.pin_memory().to(device, non_blocking=True) for t in tensors))


@dataclass(frozen=True)
class Examples:
    """A split in tokens.

    Args:
        tokens: of each example, with the special ones.
        types: which sentence each token is of; None where the model takes none.
        labels: int64 classes or float32 scores.
        pad: the id that fills a batch.
    """

    tokens: Sequence[np.ndarray]
    types: Sequence[np.ndarray] | None
    labels: np.ndarray
    pad: int

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, places: Sequence[int] | np.ndarray) -> Batch:
        """The examples at some places."""
        length = max(len(self.tokens[i]) for i in places)
        tokens = np.full((len(places), length), self.pad, dtype=np.int64)
        mask, types = np.zeros_like(tokens), np.zeros_like(tokens)
        for row, i in enumerate(places):
            tokens[row, : len(self.tokens[i])] = self.tokens[i]
            mask[row, : len(self.tokens[i])] = 1
            if self.types is not None:
                types[row, : len(self.types[i])] = self.types[i]
        given = None if self.types is None else torch.from_numpy(types)
        return Batch(torch.from_numpy(tokens), torch.from_numpy(mask), torch.from_numpy(self.labels[places]), given)

    def lengths(self) -> np.ndarray:
        """Of each example, in tokens."""
        return np.array([len(tokens) for tokens in self.tokens])

    def by_length(self, batch_size: int) -> Iterator[Batch]:
        """All examples once, the longest first, so that there is little padding."""
        order = np.argsort(-self.lengths(), kind="stable")
        for begin in range(0, len(order), batch_size):
            yield self.batch(order[begin : begin + batch_size])


class TrainingOrder:
    """Which examples make the batch of each step: a pure function of seed and step.

    In each epoch the examples are permuted, those of 50 batches at a time are sorted by length and cut into batches,
    and the batches are permuted. The last examples of an epoch make a smaller batch.

    Args:
        lengths: of the examples, in tokens.
        batch_size: examples in a step.
        seed: of the permutations.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int) -> None:
        self._lengths, self._batch_size, self._seed = lengths, batch_size, seed
        self.steps = -(-len(lengths) // batch_size)  # of an epoch
        self._epoch: tuple[int, list[np.ndarray]] | None = None

    def __getitem__(self, step: int) -> np.ndarray:
        """The places of a step's examples; the first step is step 1."""
        epoch, number = divmod(step - 1, self.steps)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, self._batches(np.random.default_rng([self._seed, epoch])))
        return self._epoch[1][number]

    def _batches(self, generator: np.random.Generator) -> list[np.ndarray]:
        order, together = generator.permutation(len(self._lengths)), ALIKE * self._batch_size
        batches = []
        for begin in range(0, len(order), together):
            some = order[begin : begin + together]
            some = some[np.argsort(-self._lengths[some], kind="stable")]
            batches += [some[i : i + self._batch_size] for i in range(0, len(some), self._batch_size)]
        return [batches[i] for i in generator.permutation(len(batches))]


class Labelled:
    """The splits that a run reads.

    Args:
        data: which they are.
        tokenizer: of the model.
        length: tokens of an example at most; longer ones lose the end of the longer sentence.
        cache_root: where `datasets` keeps what it has downloaded and converted.

    Attributes:
        train: a split in tokens, or the part of it that `data.examples` asks for.
        validation: name -> a split in tokens.
        fingerprint: the same for the same texts and labels.

    Raises:
        SettingError: a missing or wrong input; the message is one line.
    """

    def __init__(
        self, data: LabelledSettings, tokenizer: PreTrainedTokenizerBase, length: int, cache_root: Path
    ) -> None:
        self._data, self._tokenizer, self._length = data, tokenizer, length
        splits = _read(data, cache_root)
        splits[data.split] = _part(splits[data.split], data)
        for name, rows in splits.items():
            _refuse_bad_labels(rows, name, data)
        digest = hashlib.sha256(json.dumps([data.fields, data.classes]).encode())
        for rows in splits.values():
            for column in (*data.fields, data.label_field):
                digest.update(json.dumps(rows[column][:]).encode())
        self.fingerprint = digest.hexdigest()
        cut = {name: self._cut(rows) for name, rows in splits.items()}
        self.train = cut.pop(data.split)
        self.validation = cut

    def about(self) -> dict[str, Any]:
        """What identifies the data, and how much there is of it, for a record."""
        data = self._data
        examples = {data.split: len(self.train), **{name: len(found) for name, found in self.validation.items()}}
        source = {"name": data.source, "subset": data.subset, "revision": data.revision}
        return {"fingerprint": self.fingerprint, "source": source, "examples": examples, "metrics": list(data.metrics)}

    def _cut(self, rows: Dataset) -> Examples:
        tokens: list[np.ndarray] = []
        types: list[np.ndarray] = []
        takes_types = "token_type_ids" in self._tokenizer.model_input_names
        for begin in range(0, len(rows), 10_000):  # as Python's lists they are large
            part = rows[begin : begin + 10_000]
            texts = [[text or "" for text in part[field]] for field in self._data.fields]
            found = self._tokenizer(
                *texts, truncation=True, max_length=self._length, return_token_type_ids=takes_types,
                return_attention_mask=False,
            )  # fmt: skip
            tokens += [np.array(ids, dtype=np.int32) for ids in found["input_ids"]]
            types += [np.array(ids, dtype=np.int8) for ids in found["token_type_ids"]] if takes_types else []
        kind = np.float32 if self._data.classes is None else np.int64
        labels = np.array(rows[self._data.label_field][:], dtype=kind)
        pad = self._tokenizer.pad_token_id
        return Examples(tokens, types if takes_types else None, labels, 0 if pad is None else pad)


def _read(data: LabelledSettings, cache_root: Path) -> dict[str, Dataset]:
    """The training split and the validation splits, by name and in this order."""
    import datasets

    datasets.disable_progress_bars()
    named = f"data.source is {data.source}, data.subset is {data.subset or 'null'}"
    try:
        with faults.of_hub("data.source", str(data.source)):
            found = datasets.load_dataset(
                str(data.source), data.subset, revision=data.revision, cache_dir=str(cache_root / "datasets")
            )
    except (ValueError, RuntimeError) as error:  # no such subset, or none is named of several
        reason = " ".join(str(error).split()).partition(" Example of usage")[0]
        raise SettingError(f"{named}: {reason}") from error
    splits = {}
    for setting, names in (("split", [data.split]), ("validation_splits", data.validation_splits)):
        for name in names:
            if name not in found:
                raise SettingError(f"{named}: there is no data.{setting} {name}; allowed: {', '.join(found)}")
            splits[name] = found[name]
    columns = splits[data.split].column_names
    for setting, names in (("fields", data.fields), ("label_field", [data.label_field])):
        for name in names:
            if name not in columns:
                allowed = ", ".join(columns)
                raise SettingError(f"{named}: there is no column {name} (data.{setting}); allowed: {allowed}")
    return splits


def _part(rows: Dataset, data: LabelledSettings) -> Dataset:
    """The first so many of the rows in an order that is the same for all runs."""
    if data.examples is None:
        return rows
    if data.examples > len(rows):
        raise SettingError(f"data.examples is {data.examples:,}; allowed: up to the {len(rows):,} of {data.split}")
    order = np.random.default_rng(PART_KEY).permutation(len(rows))
    return rows.select(np.sort(order[: data.examples]))


def _refuse_bad_labels(rows: Dataset, split: str, data: LabelledSettings) -> None:
    if not len(rows):
        raise SettingError(f"data.source is {data.source}, whose split {split} has no rows")
    for number, label in enumerate(rows[data.label_field][:]):
        is_number = isinstance(label, int | float) and np.isfinite(label)
        if data.classes is None:
            allowed, holds = "a number", is_number
        else:
            allowed, holds = f"0 to {data.classes - 1} (data.classes)", is_number and label in range(data.classes)
        if not holds:
            if label == -1 or label is None:
                allowed += "; a split without labels cannot be used"
            where = f"data.source is {data.source}: row {number} of {split}"
            raise SettingError(f"{where} has the label {label}; allowed: {allowed}")
