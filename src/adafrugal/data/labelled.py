"""Read labelled sentences and pairs, tokenize them, and batch examples of similar length."""

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
from torch.nn.utils.rnn import pad_sequence

from adafrugal.data.rows import Tensors
from adafrugal.data.text import faults
from adafrugal.settings.repositories import is_path
from adafrugal.settings.schema import LabelledSettings
from adafrugal.system.errors import SettingError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

Columns = dict[str, list[Any]]

ALIKE = 50  # batches in a group whose examples are sorted by length
AT_ONCE = 10_000  # rows read or tokenized at a time
PART_KEY = 0x5EED  # seed of the permutation whose first rows `data.examples` takes


@dataclass(frozen=True)
class LabelledBatch(Tensors):
    """Examples, padded to the longest one."""

    tokens: Tensor  # int64 [examples, length]
    mask: Tensor  # int64 [examples, length], 1 for a token and 0 for padding
    labels: Tensor  # [examples], int64 classes or float32 scores
    types: Tensor | None = None  # int64 [examples, length], the sentence that has a token; None if the model needs none

    def count(self) -> int:
        """Return the number of examples; the loss is averaged over them."""
        return len(self.labels)

    def real_tokens(self) -> int:
        """Return the number of non-padding tokens."""
        return int(self.mask.sum())


@dataclass(frozen=True)
class Examples:
    """A tokenized split."""

    tokens: Sequence[np.ndarray]  # int32 [tokens] of each example, special tokens included
    types: Sequence[np.ndarray] | None  # int8 [tokens] of each example, as `LabelledBatch.types`
    labels: np.ndarray  # [examples], int64 classes or float32 scores
    pad: int  # the padding id

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, numbers: Sequence[int] | np.ndarray) -> LabelledBatch:
        """Return the examples with these numbers in the split, padded."""

        def padded(arrays: Sequence[np.ndarray], value: int) -> Tensor:
            return pad_sequence([torch.from_numpy(arrays[i]).long() for i in numbers], True, value)

        tokens, lengths = padded(self.tokens, self.pad), torch.tensor([len(self.tokens[i]) for i in numbers])
        mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
        types = None if self.types is None else padded(self.types, 0)
        return LabelledBatch(tokens, mask, torch.from_numpy(self.labels[numbers]), types)

    def lengths(self) -> np.ndarray:
        """Count the tokens of each example, int64 [examples]."""
        return np.array([len(tokens) for tokens in self.tokens])

    def by_length(self, batch_size: int) -> Iterator[LabelledBatch]:
        """Yield all examples once, the longest first, to have little padding."""
        order = np.argsort(-self.lengths(), kind="stable")
        for begin in range(0, len(order), batch_size):
            yield self.batch(order[begin : begin + batch_size])


class TrainingOrder:
    """Chooses the `batch_size` examples of each step's batch: a pure function of seed and step.

    Each epoch permutes the examples, sorts each group of `ALIKE` batches by length (`lengths` in tokens, int64
    [examples]), cuts it into batches, and permutes the batches. One batch of an epoch may be smaller.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int) -> None:
        self._lengths, self._batch_size, self._seed = lengths, batch_size, seed
        self.steps = -(-len(lengths) // batch_size)  # per epoch
        self._epoch: tuple[int, list[np.ndarray]] | None = None

    def __getitem__(self, step: int) -> np.ndarray:
        """Return the numbers of a step's examples, int64 [examples]; the first step is 1."""
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
    """The tokenized splits of a run.

    Args:
        data: names the source, its splits and its columns.
        tokenizer: of the model.
        length: most tokens of an example; longer ones are truncated, the longer sentence of a pair first.
        cache_root: its datasets/ is the cache of `datasets`.

    Attributes:
        train: the training split, or `data.examples` rows of it.
        validation: name -> split.
        fingerprint: equal for equal texts and labels.

    Raises:
        SettingError: a missing or wrong input; the message is one line.
    """

    def __init__(
        self, data: LabelledSettings, tokenizer: PreTrainedTokenizerBase, length: int, cache_root: Path
    ) -> None:
        self._data, self._tokenizer, self._length = data, tokenizer, length
        splits = _read(data, cache_root)
        splits[data.split] = _part(splits[data.split], data)
        digest = hashlib.sha256(json.dumps([data.fields, data.classes]).encode())
        for name, columns in splits.items():
            _refuse_bad_labels(columns[data.label_field], name, data)
            for column in (*data.fields, data.label_field):
                digest.update(json.dumps(columns[column]).encode())
        self.fingerprint = digest.hexdigest()
        self.validation = {name: self._cut(columns) for name, columns in splits.items()}
        self.train = self.validation.pop(data.split)

    def fingerprint_with(self, weights: str) -> str:
        """Return a hash of texts, labels, token ids and initial weights; `weights` identifies the last."""
        digest = hashlib.sha256((self.fingerprint + weights).encode())
        for examples in (self.train, *self.validation.values()):
            for tokens in examples.tokens:
                digest.update(tokens.tobytes())
        return digest.hexdigest()

    def about(self) -> dict[str, Any]:
        """Return the identity and size of the data, for a record."""
        data = self._data
        examples = {data.split: len(self.train), **{name: len(found) for name, found in self.validation.items()}}
        source = {"name": data.source, "subset": data.subset, "revision": data.revision}
        return {"fingerprint": self.fingerprint, "source": source, "examples": examples, "metrics": list(data.metrics)}

    def _cut(self, columns: Columns) -> Examples:
        tokens, types, labels = [], [], columns[self._data.label_field]
        takes_types = "token_type_ids" in self._tokenizer.model_input_names
        for begin in range(0, len(labels), AT_ONCE):  # Python's lists of ids need much memory
            texts = [[text or "" for text in columns[field][begin : begin + AT_ONCE]] for field in self._data.fields]
            found = self._tokenizer(
                *texts, truncation=True, max_length=self._length, return_token_type_ids=takes_types,
                return_attention_mask=False,
            )  # fmt: skip
            tokens += [np.array(ids, dtype=np.int32) for ids in found["input_ids"]]
            types += [np.array(ids, dtype=np.int8) for ids in found["token_type_ids"]] if takes_types else []
        kind, pad = np.float32 if self._data.classes is None else np.int64, self._tokenizer.pad_token_id
        return Examples(tokens, types if takes_types else None, np.array(labels, dtype=kind), 0 if pad is None else pad)


def training_examples(data: LabelledSettings) -> int:
    """Count the training examples of a local directory, of which `data.examples` may be a part.

    Raises:
        SettingError: as of `Labelled`.
    """
    return len(_read(data, Path())[data.split][data.label_field])


def _read(data: LabelledSettings, cache_root: Path) -> dict[str, Columns]:
    """Read the columns of each split, by the split's name; the training split is first."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are raised, too
    name = str(data.source)
    is_local, named = Path(name).is_dir(), f"data.source is {name}, data.subset is {data.subset or 'null'}"
    if not is_local and is_path(name):
        raise SettingError(f"data.source is {name}, and there is no such directory; a hub repository is owner/name")
    # local files are streamed: `datasets` would use its cached copy even after they changed
    how = {"streaming": True} if is_local else {"cache_dir": str(cache_root / "datasets")}
    with faults.of_hub("data.source", name, otherwise=named):  # errors of datasets, arrow, gzip, …
        found = datasets.load_dataset(name, data.subset, revision=data.revision, **how)
        wanted = [("split", data.split), *(("validation_splits", split) for split in data.validation_splits)]
        for setting, split in wanted:
            if split not in found:
                raise SettingError(f"{named}: there is no data.{setting} {split}; allowed: {', '.join(found)}")
        return {split: _columns(found[split], data, named) for _, split in wanted}


def _columns(rows: Dataset | IterableDataset, data: LabelledSettings, named: str) -> Columns:
    """Read the columns of a split that the run needs."""
    wanted = {**dict.fromkeys(data.fields, "fields"), data.label_field: "label_field"}
    columns: Columns = {name: [] for name in wanted}
    for table in rows.with_format("arrow").iter(batch_size=AT_ONCE):
        for name, setting in wanted.items():
            if name not in table.column_names:
                allowed = ", ".join(table.column_names)
                raise SettingError(f"{named}: there is no column {name} (data.{setting}); allowed: {allowed}")
            values = table.column(name).to_pylist()
            columns[name] += values
            given = next((v for v in values if not isinstance(v, str | None)), None)
            if setting == "fields" and given is not None:
                raise SettingError(f"{named}: the column {name} holds {type(given).__name__}; data.fields are texts")
    if not columns[data.label_field]:
        raise SettingError(f"{named}: a split has no rows")
    return columns


def _part(columns: Columns, data: LabelledSettings) -> Columns:
    """Return a random choice of `data.examples` rows, in order and the same for all runs; None: all rows."""
    if data.examples is None:
        return columns
    rows = len(columns[data.label_field])
    if data.examples > rows:
        raise SettingError(f"data.examples is {data.examples:,}; allowed: up to the {rows:,} of {data.split}")
    numbers = np.sort(np.random.default_rng(PART_KEY).permutation(rows)[: data.examples])
    return {name: [values[i] for i in numbers] for name, values in columns.items()}


def _refuse_bad_labels(labels: Sequence[Any], split: str, data: LabelledSettings) -> None:
    allowed = "a number"
    if data.classes is not None:
        allowed = f"0 to {data.classes - 1} (data.classes), as whole numbers"
    for number, label in enumerate(labels):
        is_number = isinstance(label, int | float) and np.isfinite(label)
        if not is_number or (data.classes is not None and label not in range(data.classes)):
            where = f"data.source is {data.source}: row {number} of {split}"
            hint = "; a split without labels cannot be used" if label in (-1, None) else ""
            raise SettingError(f"{where} has the label {str(label)[:40]}; allowed: {allowed}{hint}")
