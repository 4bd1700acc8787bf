"""The typed schema of every setting: Hydra composes YAML files and command-line overrides onto these dataclasses.

A setting whose choices differ in what they need (an optimizer, a schedule) has one dataclass for each `kind`.
This module, `checks` and `possible` import neither torch nor anything that does, so that a wrong setting is answered at
once.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from adafrugal.system.errors import SettingError


def is_plain_name(name: str) -> bool:
    """Whether it names a file or directory in the one that it is put into, and nothing elsewhere."""
    return all(c.isalnum() or c in "._-+=" for c in name) and bool(name.strip("."))


# -- the groups -------------------------------------------------------------------------------------------------------


@dataclass
class PretrainSettings:
    """Causal language modelling from random weights."""

    kind: str = "pretrain"


@dataclass
class FinetuneSettings:
    """Classes or scores of sentences and pairs, from a pretrained encoder."""

    kind: str = "finetune"
    lr: float = 1e-4  # of FRUGAL and its relatives on this task: their optimizer.lr refers to it


@dataclass
class LlamaSettings:
    """A LLaMA decoder; the names are transformers', except `vocabulary_size`."""

    kind: str = "llama"
    vocabulary_size: int = 32_000
    hidden_size: int = 256
    intermediate_size: int = 688
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    max_position_embeddings: int = 1024
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    dtype: str = "float32"  # of the weights; or bfloat16
    loss_chunk_rows: int | str | None = "auto"  # rows of logits held at once; null: all of a micro-batch; auto: as fit


@dataclass
class EncoderSettings:
    """A pretrained encoder and its tokenizer, as transformers' Auto classes read them."""

    kind: str = "encoder"
    name: str | None = None  # hub repository or directory
    revision: str | None = None  # of a hub repository; null: the newest
    package: str | None = None  # an installed package whose directory `model` is read instead


@dataclass
class TokenizerSettings:
    """What cuts text into tokens: made at first use, or read from files."""

    kind: str = "train"  # on the corpus; or pretrained (as transformers reads it), sentencepiece (a .model file)
    name: str | None = None  # pretrained: hub repository or directory; sentencepiece: the file
    vocabulary_size: int | None = None  # of a trained one; null: 4,096, or the model's where that is smaller
    model_type: str = "bpe"
    byte_fallback: bool = True  # bytes that no piece covers are spelt out, so that no text is lost
    normalization: str = "none"  # of Unicode before anything else: none, nfc, nfkc
    sample_bytes: int = 2_000_000  # of text that one is trained on; more changes few pieces and costs minutes


@dataclass
class EmbeddedSettings:
    """English prose that every installation has: the docstrings of pinned packages."""

    kind: str = "embedded"
    tokenizer: TokenizerSettings = field(default_factory=TokenizerSettings)
    rows: str = "packed"  # no padding; or document: one a row, truncated or padded
    mask_documents: bool = False  # packed rows: attention and loss stop at a document's end
    repeat: bool = True  # read the text again when the run is longer than it; false: stop with a message
    window_tokens: int = 1 << 24  # rows are permuted within windows of about so many tokens
    store_limit_gib: float | None = None  # null: as long as the text, or what the run needs of it
    processes: int | None = None  # that cut text into tokens; null: one for each core


@dataclass
class CorpusSettings(EmbeddedSettings):
    """Documents from a hub repository, a local copy of one, or files."""

    kind: str = "corpus"
    source: str | None = None  # hub repository, directory in its layout, or a file name with * and ?
    subset: str | None = None  # the hub's word for a repository's configuration
    revision: str | None = None  # of a hub repository; null: the newest when it is first read
    text_field: str = "text"
    sample_by: str = "paragraph"  # what is one document of a .txt file: line, paragraph, document (the file)
    split: str = "train"
    validation_split: str | None = None  # null: "validation" where there is one, else documents held out by hash
    held_out: float = 0.01  # the share of the documents that is held out where there is no such split
    repeat: bool = False


@dataclass
class LabelledSettings:
    """Sentences or pairs of them with a class or a score each, in the layout of GLUE."""

    kind: str = "labelled"
    source: str | None = None  # hub repository, or a directory in its layout
    subset: str | None = None  # the hub's word for a repository's configuration
    revision: str | None = None
    fields: list[str] = field(default_factory=list)  # the columns that are read: one, or the two of a pair
    label_field: str = "label"
    classes: int | None = 2  # labels are 0 to classes − 1; null: they are scores, and the loss is the squared error
    split: str = "train"
    validation_splits: list[str] = field(default_factory=lambda: ["validation"])  # the first decides what is best
    metrics: list[str] = field(default_factory=lambda: ["accuracy"])  # the first decides what is best
    examples: int | None = None  # train on a part, the same for every seed; null: all


@dataclass
class AdamWSettings:
    """torch.optim.AdamW."""

    kind: str = "adamw"
    lr: float = 1e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.0
    split_lr_scale: float = 1.0  # of lr, for the Linear weights in the blocks


@dataclass
class ModuleSettings:
    """How modules outside FRUGAL's split are treated: state_full, split, state_free (permanently) or frozen."""

    embeddings: str = "state_full"
    norms: str = "state_full"
    head: str = "state_full"
    split: list[str] | None = None  # which Linear in the blocks, as patterns for their names; null: all
    unsplit: str = "state_free"  # the other Linear in the blocks


@dataclass
class FrugalSettings(AdamWSettings):
    """adafrugal.optim.Frugal: what is not set here is described there."""

    kind: str = "frugal"
    density: Any = 0.25
    fit_gib: float | None = None  # of memory that the estimate has to stay under: ρ begins lower where it would not
    rank: Any = None  # instead of the density: a number of columns out of the model's hidden size
    interval: Any = 200
    subspace: Any = "blocks"
    state_full: str = "adamw"
    state_free: str = "signsgd"
    state_free_lr_scale: float = 1.0
    on_refresh: str = "reset"
    shrink: str = "immediately"
    stagger: int = 1
    state_dtype: str | None = None  # null: float32
    stochastic_rounding: bool = False
    nonfinite: str | None = None
    modules: ModuleSettings = field(default_factory=ModuleSettings)
    fused: bool = True
    compile: bool | None = None  # null: for large models on a CPU


@dataclass
class AdafactorSettings:
    """torch.optim.Adafactor; `lr` is its largest relative step, `clip` its d."""

    kind: str = "adafactor"
    lr: float = 1e-2
    beta2_decay: float = -0.8
    clip: float = 1.0
    weight_decay: float = 0.0


@dataclass
class MuonSettings(AdamWSettings):
    """torch.optim.Muon on the split matrices, at a rate that is adjusted to AdamW's, and fused AdamW elsewhere."""

    kind: str = "muon"
    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5


@dataclass
class AdamW8bitSettings(AdamWSettings):
    """torchao.optim.AdamW8bit, where torchao is installed: `pip install torchao`."""

    kind: str = "adamw_8bit"
    block_size: int = 256


@dataclass
class LoraSettings(AdamWSettings):
    """LoRA through peft, where that is installed: AdamW on low-rank adapters and the head, all else frozen."""

    kind: str = "lora"
    rank: int = 8
    alpha: float = 8.0  # the adapters' product is scaled by alpha ÷ rank
    dropout: float = 0.0
    targets: list[str] = field(default_factory=list)  # names of the modules that get adapters


@dataclass
class ConstantSchedule:
    """The full learning rate after the warm-up."""

    kind: str = "constant"
    warmup: int | float | None = None  # steps, or a share of the run below 1; null: a tenth of the run


@dataclass
class LinearSchedule(ConstantSchedule):
    """A straight line from the learning rate to `floor` of it at the end of the run."""

    kind: str = "linear"
    floor: float = 0.0


@dataclass
class CosineSchedule(LinearSchedule):
    """Half a cosine from the learning rate to `floor` of it at the end of the run."""

    kind: str = "cosine"
    floor: float = 0.1


@dataclass
class RestartingSchedule(CosineSchedule):
    """The cosine and its warm-up over and over, every `cycle` steps."""

    kind: str = "cosine_restarts"
    cycle: int | None = None  # steps; null: the whole run


@dataclass
class TrainerSettings:
    """The loop."""

    steps: int | None = 500  # null: as many as `epochs` are
    epochs: float | None = None  # where steps is null
    batch_size: int = 8  # sequences per optimizer step
    micro_batch_size: int | None = None  # sequences per forward and backward; null: all, on a GPU as many as fit
    sequence_length: int = 128
    clip_norm: float | None = None  # null: gradients are not clipped
    precision: str = "auto"
    device: str = "auto"
    compile: bool | str = "auto"  # forward, loss and backward with torch.compile; auto: on a GPU
    compile_mode: str = "auto"  # torch.compile's; auto: reduce-overhead (CUDA graphs) where it is safe, else default
    parallel: str = "none"  # of several processes: ddp (each has the whole model) or fsdp (each a part of it)
    replicas: int = 1  # with fsdp: so many groups of processes that each have the whole model between them
    offload: bool = False  # with fsdp: weights, gradients and state wait in the CPU's memory
    timeout: float = 600.0  # seconds that a process waits for the others in training
    update_in_backward: bool = False  # each tensor as soon as its gradient is there, which is then let go of
    activation_checkpointing: str = "none"  # layers: each is made again in the backward pass; selective: but products
    log_every: int = 10  # steps in one line of metrics.jsonl
    on_nonfinite: str = "error"  # where a step's loss is NaN or infinite; or skip: leave the step out
    max_skips: int = 10  # of a run; one more is an error


@dataclass
class EvalSettings:
    """Validation during and after the run."""

    every: int | None = 100  # steps; null: an epoch
    tokens: int = 16_384  # of held-out text; labelled validation sets are read whole
    last_tokens: int | None = None  # of the evaluation that ends the run; null: as many as of the others


@dataclass
class LocalTracking:
    """The record in the run's directory, and nothing else."""

    kind: str = "local"


@dataclass
class WandbTracking:
    """The record, and a copy of it to Weights & Biases."""

    kind: str = "wandb"
    mode: str = "offline"
    project: str = "adafrugal"
    entity: str | None = None


@dataclass
class CheckpointSettings:
    """When the state of the run is saved beside its end."""

    every: int = 100
    keep: int = 1  # of the newest
    best: bool = True  # save at each evaluation of `eval.every` that is the best so far, and keep that one, too


@dataclass
class Settings:
    """Everything that can be set, in the order in which `--cfg job` shows it."""

    seed: int = 0
    arm: str | None = None
    task: Any = MISSING
    data: Any = MISSING
    model: Any = MISSING
    optimizer: Any = MISSING
    schedule: Any = MISSING
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    tracking: Any = MISSING
    run_root: str = "runs"
    cache_root: str = "cache"


# group -> the dataclasses that a file of conf/<group> can start from, as `schema_<kind>`
SCHEMAS: dict[str, tuple[type, ...]] = {
    "task": (PretrainSettings, FinetuneSettings),
    "data": (EmbeddedSettings, CorpusSettings, LabelledSettings),
    "model": (LlamaSettings, EncoderSettings),
    "optimizer": (AdamWSettings, FrugalSettings, AdafactorSettings, MuonSettings, AdamW8bitSettings, LoraSettings),
    "schedule": (ConstantSchedule, LinearSchedule, CosineSchedule, RestartingSchedule),
    "tracking": (LocalTracking, WandbTracking),
}

COMPILE_MODES = ("auto", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")  # torch.compile's
TOKENIZERS = ("train", "pretrained", "sentencepiece")
NORMALIZATIONS = ("none", "nfc", "nfkc")
METRICS = {"classes": ("accuracy", "f1", "matthews"), "scores": ("pearson", "spearman")}  # for what labels are


def register() -> None:
    """Put the schema into Hydra's ConfigStore."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(name="schema", node=Settings)
    for group, schemas in SCHEMAS.items():
        for schema in schemas:
            store.store(group=group, name=f"schema_{schema.kind}", node=schema)


def run_steps(settings: Settings) -> int:
    """The steps of the run, or more than any run has where only its epochs are known."""
    return settings.trainer.steps or 1 << 40


def settled(settings: Settings, epoch: int | None, hidden_size: int) -> Settings:
    """The same settings with what the data and the model decide filled in.

    Where `trainer.steps` is null, `trainer.epochs` counts; where `eval.every` is, an epoch; where a loss-aware
    interval's `every` is, an epoch, or a twentieth of the run where that is shorter; where `optimizer.density` is,
    `optimizer.rank`.

    Args:
        settings: as they were checked.
        epoch: its steps; None where a run has no epochs to speak of, and nothing in the settings needs them.
        hidden_size: of the model.

    Raises:
        SettingError: a rank above the hidden size.
    """
    found = copy.deepcopy(settings)
    optimizer = found.optimizer
    if epoch is not None:
        found.trainer.steps = found.trainer.steps or max(1, round((found.trainer.epochs or 0) * epoch))
        found.trainer.epochs = None
        found.eval.every = found.eval.every or epoch
        interval = getattr(optimizer, "interval", None)
        if isinstance(interval, dict) and interval["kind"] == "loss_aware" and interval.get("every") is None:
            interval["every"] = min(epoch, max(1, found.trainer.steps // 20))
    if isinstance(optimizer, FrugalSettings) and optimizer.rank is not None:
        density = density_of_rank(optimizer.rank, hidden_size)
        if max(density.get(key, 0) for key in ("value", "start", "end")) > 1:
            raise SettingError(f"optimizer.rank is {optimizer.rank}; allowed: up to the hidden size, {hidden_size}")
        optimizer.density, optimizer.rank = density, None
    return found


def trained_size(settings: Settings) -> int:
    """The number of pieces of a tokenizer that the run trains."""
    return settings.data.tokenizer.vocabulary_size or min(4096, settings.model.vocabulary_size)


def density_of_rank(rank: Any, hidden_size: int) -> dict[str, Any]:
    """The density control that selects as many columns of `hidden_size` as a control of ranks says."""
    control = dict(rank) if isinstance(rank, dict) else {"kind": "constant", "value": rank}
    return {key: v / hidden_size if key in ("value", "start", "end") else v for key, v in control.items()}


def with_run_length(control: Any, steps: int) -> dict[str, Any]:
    """A control's settings, a plain number as a constant, and what is null filled in.

    A decay lasts the run, or a share of it below 1; a loss is observed 20 times in it.
    """
    filled = dict(control) if isinstance(control, dict) else {"kind": "constant", "value": control}
    if filled.get("kind") in ("linear", "cosine"):
        given = filled.get("steps")
        is_share = isinstance(given, float) and 0 < given < 1
        filled["steps"] = steps if given is None else max(1, round(given * steps)) if is_share else given
    if filled.get("kind") == "loss_aware" and filled.get("every") is None:
        filled["every"] = max(1, steps // 20)
    return filled
