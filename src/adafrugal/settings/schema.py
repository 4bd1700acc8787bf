"""The typed schema of every setting: Hydra composes YAML files and command-line overrides onto these dataclasses.

A setting whose choices need different settings (an optimizer, a schedule) has a dataclass for each `kind`. A field
declares its range; each class checks which of its values go together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from omegaconf import MISSING

from adafrugal.settings.data_settings import SEEDS, CorpusSettings, EmbeddedSettings, LabelledSettings, is_seed
from adafrugal.settings.optimizer_settings import (
    AdafactorSettings,
    AdamW8bitSettings,
    AdamWSettings,
    ApolloSettings,
    FiraSettings,
    FrugalSettings,
    LoraSettings,
    MuonSettings,
    ScaleSettings,
)
from adafrugal.settings.ranges import Part, above, at_least, is_number, near_divisors, one_of, ranged, within
from adafrugal.settings.schedule_settings import (
    ConstantSchedule,
    CosineSchedule,
    LinearSchedule,
    RestartingSchedule,
    WsdSchedule,
)
from adafrugal.system.errors import SettingError


def is_plain_name(name: str) -> bool:
    """Return whether a name can be that of a file or directory: no path, and not only dots."""
    return all(c.isalnum() or c in "._-+=" for c in name) and bool(name.strip("."))


class TaskSettings(Part, path="task"):
    """A task."""

    has_epochs: ClassVar[bool] = False  # of known length
    takes: ClassVar[dict[str, tuple[tuple[str, ...], str]]]  # group -> kinds that go with the task, example file

    def check(self, s: Settings) -> None:
        """Require data and a model of kinds that go with the task."""
        for group, (kinds, such) in self.takes.items():
            if (kind := type(getattr(s, group)).kind) not in kinds:
                allowed = f"a {group} file of kind {' or '.join(kinds)}, such as {group}={such}, or another task"
                raise SettingError(f"{group} is of kind {kind} and task is {type(self).kind}; allowed: {allowed}")


@dataclass
class PretrainSettings(TaskSettings):
    """Causal language modelling, from random weights or from others."""

    takes: ClassVar = {"data": (("embedded", "corpus"), "embedded"), "model": (("llama", "decoder"), "llama_3m")}
    kind: str = "pretrain"


@dataclass
class FinetuneSettings(TaskSettings):
    """Classification or regression of sentences and pairs, from a pretrained encoder."""

    has_epochs: ClassVar[bool] = True
    takes: ClassVar = {"data": (("labelled",), "rte"), "model": (("encoder",), "roberta_base")}
    kind: str = "finetune"
    lr: float = at_least(0, 1e-4)  # of FRUGAL's family on this task: their optimizer.lr refers to it


def _chunk_rows() -> Any:
    """Return the field of the rows of logits held at once; null: all of a micro-batch; auto: as many as fit."""
    return ranged(
        "auto", lambda rows: rows == "auto" or (is_number(rows) and rows >= 1), "auto, 1 or more, or null for no chunks"
    )


@dataclass
class LlamaSettings(Part, path="model"):
    """A LLaMA decoder; the names are transformers', except `vocabulary_size`."""

    kind: str = "llama"
    vocabulary_size: int = at_least(1, 32_000)
    hidden_size: int = ranged(256, lambda size: size > 0 and size % 2 == 0, "an even number, 2 or more")
    intermediate_size: int = at_least(1, 688)
    num_hidden_layers: int = within(1, 10_000, 4)
    num_attention_heads: int = at_least(1, 4)
    max_position_embeddings: int = 1024
    rms_norm_eps: float = ranged(1e-6, lambda eps: 0 < eps < 1, "above 0, below 1")
    initializer_range: float = ranged(0.02, lambda deviation: 0 <= deviation < 10, "0 or more, below 10")
    dtype: str = one_of("float32", "bfloat16")  # of the weights
    loss_chunk_rows: int | str | None = _chunk_rows()
    weights: str | None = None  # to begin with: a run's checkpoint, a directory or a hub repository; null: random ones
    revision: str | None = None  # of weights from the hub; null: the newest

    def check(self, s: Settings) -> None:
        """Require heads of an even size, enough positions, and a precision that suits the dtype."""
        pairs, heads, longest = self.hidden_size // 2, self.num_attention_heads, self.max_position_embeddings
        such = f"such as {near_divisors(pairs, heads)}"
        even = f"as many heads of an even size as make up model.hidden_size ({self.hidden_size}), {such}"
        self.need(pairs % heads == 0, "num_attention_heads", even)
        positions = f"up to model.max_position_embeddings ({longest})"
        s.trainer.need(s.trainer.sequence_length <= longest, "sequence_length", positions)
        self.need(self.revision is None or self.weights is not None, "revision", "null without model.weights")
        is_same = self.dtype == "float32" or s.trainer.precision == "bf16"
        s.trainer.need(is_same, "precision", "bf16, since model.dtype is bfloat16")


@dataclass
class DecoderSettings(Part, path="model"):
    """Any decoder that transformers' AutoModelForCausalLM reads, in float32, with its own tokenizer."""

    kind: str = "decoder"
    name: str | None = None  # hub repository, or directory: also a checkpoint of a run
    revision: str | None = None  # of a hub repository; null: the newest
    pretrained: bool = True  # begin with its weights; false: with random ones, in the shape of its config.json
    vocabulary_size: int | None = at_least(1, None)  # null: its config.json has it
    loss_chunk_rows: int | str | None = _chunk_rows()

    def check(self, s: Settings) -> None:
        """Require a name, one process, and rows of one text."""
        self.need(bool(self.name), "name", "a hub repository or a directory, such as openai-community/gpt2")
        alone = "with model=decoder"
        s.data.need(not s.data.mask_documents, "mask_documents", f"false {alone}")
        s.trainer.need(s.trainer.parallel == "none", "parallel", f"none {alone}, which may have dropout")


@dataclass
class EncoderSettings(Part, path="model"):
    """A pretrained encoder and its tokenizer, as transformers' Auto classes read them."""

    kind: str = "encoder"
    name: str | None = None  # hub repository or directory
    revision: str | None = None  # of a hub repository; null: the newest
    # an installed package: read its directory `model` instead
    package: str | None = ranged(None, str.isidentifier, "the name by which Python imports a package")

    def check(self, s: Settings) -> None:
        """Require one source: a name, or a package."""
        if self.package is None:
            self.need(bool(self.name), "name", "a hub repository or a directory, such as FacebookAI/roberta-base")
        else:
            self.need(self.revision is None, "revision", "null, since a package is what is installed")
            self.need(self.name is None, "name", "null, since model.package is given; or model.package=null")


@dataclass
class TrainerSettings(Part, path="trainer"):
    """The training loop."""

    steps: int | None = at_least(1, 500)  # null: those of `epochs`
    epochs: float | None = above(0, None)  # if steps is null
    continue_from: str | None = None  # another run's directory, or a checkpoint in it, from which this run goes on
    batch_size: int = ranged(8, lambda rows: 1 <= rows <= 2**32, "1 to 2^32")  # sequences per optimizer step
    micro_batch_size: int | None = None  # sequences per forward and backward; null: all, on a GPU as many as fit
    sequence_length: int = at_least(2, 128)
    clip_norm: float | None = ranged(None, lambda norm: norm > 0, "above 0, or null for none")
    precision: str = one_of("auto", "fp32", "bf16", "fp16")
    device: str = one_of("auto", "cpu", "cuda")
    # forward, loss and backward with torch.compile; auto: on a GPU
    compile: bool | str = ranged("auto", (True, False, "auto").__contains__, "auto, true, false")
    # mode of torch.compile; auto: reduce-overhead (CUDA graphs) where that is safe, else default
    compile_mode: str = one_of("auto", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
    parallel: str = one_of("none", "ddp", "fsdp")  # each process has the whole model (ddp) or a part of it (fsdp)
    replicas: int = at_least(1, 1)  # with fsdp: number of groups of processes that shard the whole model
    offload: bool = False  # with fsdp: keep weights, gradients and state in the CPU's memory
    timeout: float = above(0, 600.0, " seconds")  # a process waits this long for the others in training
    update_in_backward: bool = False  # update each tensor once its gradient is complete, and free the gradient
    memory_limit_gib: float | None = above(1, None, " GiB of the GPU's memory")  # hold the run to it, context included
    # layers: recompute every block; selective: keep the outputs of matmuls and attention
    activation_checkpointing: str = one_of("none", "layers", "selective")
    log_every: int = at_least(1, 10)  # steps in one line of metrics.jsonl
    on_nonfinite: str = one_of("error", "skip")  # if a step's loss is NaN or infinite; skip: leave the step out
    max_skips: int = at_least(1, 10, "; trainer.on_nonfinite=error leaves out none")  # of a run; one more is an error

    def check(self, s: Settings) -> None:
        """Require a known length, and settings of a step that go together."""
        batch, micro, task = self.batch_size, self.micro_batch_size, s.task
        if self.steps is None:
            self.need(task.has_epochs, "steps", f"1 or more; task={task.kind} has no epochs that are known before")
            self.need(self.epochs is not None, "epochs", "above 0, since trainer.steps is null")
        texts = "null, since only pre-training goes on from another run; or task=pretrain"
        self.need(self.continue_from is None or task.kind == "pretrain", "continue_from", texts)
        other = f"null, since trainer.steps is {self.steps}{'; or trainer.steps=null' if task.has_epochs else ''}"
        self.need(self.steps is None or self.epochs is None, "epochs", other)
        if micro is not None:
            divisors = f"a divisor of trainer.batch_size ({batch}), such as {near_divisors(batch, micro)}"
            self.need(micro >= 1 and batch % micro == 0, "micro_batch_size", divisors)
        self._check_parallel(task)
        on_cpu = "null with trainer.device=cpu: it holds a run on a GPU to so much; `ulimit -v` limits a process"
        self.need(self.memory_limit_gib is None or self.device != "cpu", "memory_limit_gib", on_cpu)
        clashes = {  # another setting -> whether it is set, and why update_in_backward excludes it
            f"trainer.micro_batch_size={micro}": (
                micro not in (None, batch), f"each backward pass is a step then; allowed with it: {batch}, or null"),
            f"trainer.clip_norm={self.clip_norm}": (self.clip_norm is not None, "the norm is of all gradients at once"),
            "trainer.precision=fp16": (
                self.precision == "fp16", "its gradients are scaled back all at once; bf16 needs none"),
            "trainer.compile=true": (self.compile is True, "compiled code gives all gradients at once"),
            "trainer.parallel=ddp": (
                self.parallel == "ddp", "its gradients are summed in buckets; or trainer.parallel=fsdp"),
            f"optimizer.nonfinite={(nonfinite := getattr(s.optimizer, 'nonfinite', None))}": (
                nonfinite is not None, "it looks at all gradients at once; trainer.on_nonfinite looks at the loss"),
        }  # fmt: skip
        for what, (is_so, why) in clashes.items():
            is_free = not (self.update_in_backward and is_so)
            self.need(is_free, "update_in_backward", f"false with {what}, since {why}")

    def refuse_processes(self, size: int, given: str) -> None:
        """Refuse a number of processes that cannot share the run; `given` says who gave it."""
        if size > 1 and self.parallel == "none":
            raise SettingError(
                f"{given} and trainer.parallel is none; allowed with several processes: trainer.parallel=ddp or fsdp; "
                "or start train.py without torchrun"
            )
        if not size or self.batch_size % size:
            raise SettingError(f"{given}; allowed: a divisor of trainer.batch_size ({self.batch_size})")
        if size % self.replicas:
            raise SettingError(f"trainer.replicas is {self.replicas}; allowed: a divisor of the processes ({size})")
        if self.offload and size == 1:
            raise SettingError("trainer.offload is true; allowed: false with one process, which is not sharded")

    def _check_parallel(self, task: TaskSettings) -> None:
        is_sharded = self.parallel == "fsdp"
        self.need(is_sharded or self.replicas == 1, "replicas", "1, or more with trainer.parallel=fsdp")
        self.need(is_sharded or not self.offload, "offload", "false, or true with trainer.parallel=fsdp")
        alone = "none, since dropout draws on several processes what it does not draw on one"
        self.need(self.parallel == "none" or task.kind == "pretrain", "parallel", alone)
        others = "fp32, bf16 or auto with trainer.parallel=fsdp"
        self.need(not (is_sharded and self.precision == "fp16"), "precision", others)


@dataclass
class EvalSettings(Part, path="eval"):
    """Validation during and after the run."""

    every: int | None = at_least(1, 100, ", or null for an epoch of labelled sets")  # steps
    tokens: int = 16_384  # of held-out text; labelled validation sets are read whole
    last_tokens: int | None = None  # of the last evaluation; null: as many as of the others

    def check(self, s: Settings) -> None:
        """Require steps between evaluations of text, and at least one sequence in each."""
        if not s.task.has_epochs:
            least, last = s.trainer.sequence_length, self.last_tokens
            self.need(self.every is not None, "every", "1 or more")
            self.need(self.tokens >= least, "tokens", f"one sequence ({least}) or more")
            some = f"one sequence ({least}) or more, or null for eval.tokens"
            self.need(last is None or last >= least, "last_tokens", some)


@dataclass
class LocalTracking(Part, path="tracking"):
    """Only the record in the run's directory."""

    kind: str = "local"


@dataclass
class WandbTracking(Part, path="tracking"):
    """The record, and a copy of it on Weights & Biases."""

    kind: str = "wandb"
    mode: str = one_of("offline", "online")
    project: str = "adafrugal"
    entity: str | None = None
    # of the run's chart lines; null: the arm, what was typed beside its defaults, and the seed
    name: str | None = ranged(None, lambda name: 1 <= len(name) <= 128, "1 to 128 characters, or null")
    # runs that W&B shows as one line; null: <task>-<data>-<model>
    group: str | None = ranged(None, lambda name: 1 <= len(name) <= 128, "1 to 128 characters, or null")
    # beside the run's task, data, model, arm and seed
    tags: list[str] = ranged([], lambda tags: all(1 <= len(tag) <= 64 for tag in tags), "tags of 1 to 64 characters")
    x_axis: str = one_of("step", "tokens", "elapsed")  # of its charts


@dataclass
class TensorboardTracking(Part, path="tracking"):
    """The record, and a copy of its numbers for TensorBoard in the run's directory."""

    package: ClassVar = "tensorboard"
    kind: str = "tensorboard"


@dataclass
class CheckpointSettings(Part, path="checkpoint"):
    """When to save the state of the run, besides at its end."""

    every: int = at_least(1, 100)  # steps
    keep: int = at_least(1, 1)  # number of newest checkpoints
    best: bool = True  # save at each evaluation of `eval.every` that is the best so far, and keep the best, too


@dataclass
class Settings(Part):
    """All settings, in the order of `--cfg job`."""

    seed: int = ranged(0, is_seed, SEEDS)  # of weights, dropout and subspaces; and of the order of data (data.seed)
    arm: str | None = ranged(None, is_plain_name, "letters, digits and . _ - + =, since it names the run's directory")
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

    @property
    def data_seed(self) -> int:
        """The seed of the order of the data."""
        return self.seed if self.data.seed is None else self.data.seed


# group -> the dataclasses that a file of conf/<group> can extend, as `schema_<kind>`
SCHEMAS: dict[str, tuple[type, ...]] = {
    "task": (PretrainSettings, FinetuneSettings),
    "data": (EmbeddedSettings, CorpusSettings, LabelledSettings),
    "model": (LlamaSettings, DecoderSettings, EncoderSettings),
    "optimizer": (
        AdamWSettings,
        FrugalSettings,
        AdafactorSettings,
        MuonSettings,
        AdamW8bitSettings,
        LoraSettings,
        ApolloSettings,
        FiraSettings,
        ScaleSettings,
    ),
    "schedule": (ConstantSchedule, LinearSchedule, CosineSchedule, RestartingSchedule, WsdSchedule),
    "tracking": (LocalTracking, WandbTracking, TensorboardTracking),
}
