"""The settings of data: text and its tokenizer, and labelled sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from adafrugal.settings.canonical import trained_size
from adafrugal.settings.ranges import Part, at_least, one_of, ranged, within

if TYPE_CHECKING:
    from adafrugal.settings.schema import Settings

SEEDS = "a whole number from 0 to 2^63 − 1"
METRICS = {"classes": ("accuracy", "f1", "matthews"), "scores": ("pearson", "spearman")}  # by kind of label


def is_seed(number: int) -> bool:
    """Return whether a number is in the range of seeds."""
    return 0 <= number < 2**63


def _of_the_order() -> Any:
    return ranged(None, is_seed, f"{SEEDS}, or null for the run's seed")


@dataclass
class TokenizerSettings(Part, path="data.tokenizer"):
    """The tokenizer: trained at first use, or read from files."""

    kind: str = one_of("train", "pretrained", "sentencepiece")  # on the corpus; as transformers reads it; a .model file
    name: str | None = None  # pretrained: hub repository or directory; sentencepiece: the file
    vocabulary_size: int | None = None  # of a trained tokenizer; null: 4,096, or the model's if smaller
    model_type: str = one_of("bpe", "unigram")
    byte_fallback: bool = True  # encode bytes that no piece covers, so that no text is lost
    normalization: str = one_of("none", "nfc", "nfkc")  # Unicode form, applied first
    sample_bytes: int = at_least(1000, 2_000_000)  # of training text for the tokenizer; more changes few pieces

    def check(self, s: Settings) -> None:
        """Require a name for a tokenizer from files, and a possible size for a trained one."""
        if self.kind == "train":
            if s.model.kind == "decoder":  # whose weights know the ids of its own
                self.need(False, "kind", f"pretrained with model=decoder, with data.tokenizer.name={s.model.name}")
            alone = "null, since data.tokenizer.kind is train; or data.tokenizer.kind=pretrained (or sentencepiece)"
            self.need(self.name is None, "name", alone)
            most = s.model.vocabulary_size
            s.model.need(most >= 300, "vocabulary_size", "300 or more, since a tokenizer has 256 pieces for bytes")
            is_within = self.vocabulary_size is None or 300 <= self.vocabulary_size <= most
            self.need(is_within, "vocabulary_size", f"300 to model.vocabulary_size ({most})")
            return
        is_model = self.kind == "sentencepiece"
        wanted = "a .model file" if is_model else "a hub repository or a directory, such as t5-base"
        self.need(bool(self.name), "name", f"{wanted}, or data.tokenizer.kind=train")
        self.need(self.name.endswith(".model") == is_model, "name", f"{wanted} with data.tokenizer.kind={self.kind}")

    def canonical(self, s: Settings) -> None:
        """Set the size to null if it is the default, or if the tokenizer is read from files."""
        given, self.vocabulary_size = self.vocabulary_size, None
        if self.kind == "train" and given != trained_size(s):
            self.vocabulary_size = given


@dataclass
class EmbeddedSettings(Part, path="data"):
    """English prose in every installation: the docstrings of pinned packages."""

    kind: str = "embedded"
    tokenizer: TokenizerSettings = field(default_factory=TokenizerSettings)
    rows: str = one_of("packed", "document")  # packed: no padding; document: one a row, truncated or padded
    mask_documents: bool = False  # packed rows: attention and loss stop at a document's end
    repeat: bool = True  # read the text again if the run is longer; false: stop with a message
    window_tokens: int = at_least(1024, 1 << 24)  # approximate size of the windows in which rows are permuted
    store_limit_gib: float | None = ranged(None, lambda limit: limit > 0, "above 0, or null for none")
    processes: int | None = within(1, 1024, None, ", or null for one on each core")  # that tokenize text
    seed: int | None = _of_the_order()  # of the order of rows

    def check(self, s: Settings) -> None:
        """Refuse a mask of documents for rows of one document."""
        alone = "false, since a row is one document anyway; or data.rows=packed"
        self.need(self.rows == "packed" or not self.mask_documents, "mask_documents", alone)


@dataclass
class CorpusSettings(EmbeddedSettings):
    """Documents from a hub repository, a local copy of one, or files."""

    kind: str = "corpus"
    source: str | None = None  # hub repository, directory in its layout, or a file name with * and ?
    subset: str | None = None  # configuration of a hub repository
    revision: str | None = None  # of a hub repository; null: the newest at the first read
    text_field: str = "text"
    sample_by: str = one_of("paragraph", "line", "document")  # the documents of a .txt file (document: the whole file)
    split: str = "train"
    validation_split: str | None = None  # null: "validation" if it exists, else documents held out by hash
    held_out: float = ranged(0.01, lambda share: 0 < share < 1, "a share of the documents, above 0 and below 1")
    repeat: bool = False

    def check(self, s: Settings) -> None:
        """Require a source, and different splits."""
        super().check(s)
        self.need(bool(self.source), "source", "a hub repository, a directory, or files such as 'corpus/*.txt'")
        other = f"another split than data.split ({self.split}), or null to hold documents out"
        self.need(self.validation_split != self.split, "validation_split", other)


def _each_once(names: Sequence[str]) -> bool:
    return 0 < len(names) == len(set(names))


@dataclass
class LabelledSettings(Part, path="data"):
    """Sentences, or pairs of them, each with a class or a score, in the layout of GLUE."""

    kind: str = "labelled"
    source: str | None = None  # hub repository, or a directory in its layout
    subset: str | None = None  # configuration of a hub repository
    revision: str | None = None
    fields: list[str] = ranged(
        [], lambda names: _each_once(names) and len(names) < 3, "one column, or the two of a pair, each once"
    )
    label_field: str = "label"
    classes: int | None = at_least(2, 2, ", or null where labels are scores")  # null: the loss is the squared error
    split: str = "train"
    validation_splits: list[str] = ranged(["validation"], _each_once, "splits, each once, such as [validation]")
    # the first, on the first validation split, selects the best evaluation
    metrics: list[str] = ranged(["accuracy"], _each_once, "metrics, each once")
    examples: int | None = at_least(1, None, ", or null for all")  # train on a part, the same for every seed
    seed: int | None = _of_the_order()  # of the order of examples

    def check(self, s: Settings) -> None:
        """Require a source, different splits, and metrics that suit the labels."""
        self.need(bool(self.source), "source", "a hub repository such as nyu-mll/glue, or a directory like it")
        self.need(self.split not in self.validation_splits, "split", "a split that is not in data.validation_splits")
        known = METRICS["scores" if self.classes is None else "classes"]
        self.need(set(self.metrics) <= set(known), "metrics", f"of {', '.join(known)}")
        two = "f1 with two classes only, of which 1 is the one found"
        self.need("f1" not in self.metrics or self.classes == 2, "metrics", two)
