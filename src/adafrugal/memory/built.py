"""Build what a run trains as the run does, and the loss of a micro-batch; of weights and data, shapes alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from adafrugal.memory.on_device import rows_at_once, with_chunks
from adafrugal.memory.trace import Buckets, Built
from adafrugal.models import decoder, encoder, fsdp, llama, optimizers
from adafrugal.models.loss import TokenNats, of_examples
from adafrugal.models.recompute import checkpoint_activations
from adafrugal.settings.canonical import settled
from adafrugal.settings.schema import Settings
from adafrugal.system.errors import SettingError, line

EPOCH = 1000  # steps of an epoch where the data are not read: only the end of a decay of ρ depends on it


def build(settings: Settings, processes: int) -> Built:
    """Build the model of a run as one of its processes has it, and its loss.

    Raises:
        SettingError: the model's config.json cannot be read, or what the settings ask of it cannot be.
    """
    return _finetune(settings) if settings.task.kind == "finetune" else _pretrain(settings, processes)


def hidden_size(settings: Settings) -> int:
    """The hidden size of a run's model; of one that is not a LLaMA, its config.json is read.

    Raises:
        SettingError: it cannot be read.
    """
    if settings.model.kind == "llama":
        return settings.model.hidden_size
    with _reading(settings):
        found: int = (encoder if settings.task.kind == "finetune" else decoder).config(settings.model).hidden_size
    return found


@contextmanager
def met(processes: int | None) -> Iterator[None]:
    """Let torch believe that so many processes have met, of which this is the first; None: none have.

    Of fake tensors nothing is sent, so that an estimate in a run's process, too, asks no other.
    """
    if processes is None:
        yield
        return
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _reading(settings: Settings) -> Iterator[None]:
    try:
        yield
    except SettingError:
        raise
    except Exception as error:  # no such directory or repository, no network, no such architecture, …
        name = settings.model.name or settings.model.package
        raise SettingError(f"model.name is {name}, which transformers cannot build: {line(error)}") from error


def _pretrain(settings: Settings, processes: int) -> Built:
    if settings.model.kind == "decoder":
        with _reading(settings):
            settings = decoder.sized(settings)
            model = decoder.build(settings.model, reads=False)
    else:
        model = llama.build(settings.model)
    settings = with_chunks(settled(settings, None, model.config.hidden_size), None, processes)
    trainer, masked = settings.trainer, settings.data.mask_documents
    window = getattr(model.config, "sliding_window", None) or trainer.sequence_length
    if not masked and model.config._attn_implementation == "sdpa" and window >= trainer.sequence_length:
        llama.attend_causally(model)  # a run's decoder has no mask either, but for fake tensors transformers makes one
    checkpoint_activations(model, trainer.activation_checkpointing)
    tokens = torch.zeros(rows_at_once(trainer, processes), trainer.sequence_length, dtype=torch.int64)
    nats, buckets = TokenNats(model, settings.model.loss_chunk_rows), None
    if processes > 1 and trainer.parallel == "fsdp":
        with unset_fake_temporarily():  # the numbers of processes, which torch reads
            mesh = fsdp.mesh("cpu", processes, trainer.replicas)
        fsdp.shard(nats, trainer, mesh, trainer.precision)
    elif processes > 1:
        buckets = Buckets(model)

    def loss() -> Tensor:
        with _products(trainer.precision):
            return nats(tokens, tokens, tokens if masked else None)

    return Built(settings, processes, model, [model.get_output_embeddings()], loss, buckets)


def _finetune(settings: Settings) -> Built:
    data = settings.data
    with _reading(settings):
        model = encoder.build(settings.model, data.classes or 1)
    settings = settled(settings, EPOCH, model.config.hidden_size)
    trainer = settings.trainer
    checkpoint_activations(model, trainer.activation_checkpointing)
    with _staying():
        optimizers.adapt(settings, model)
    rows = rows_at_once(trainer)
    tokens = torch.zeros(rows, trainer.sequence_length, dtype=torch.int64)  # zeros: a mask of padding is kept
    labels = torch.zeros(rows, dtype=torch.float32 if data.classes is None else torch.int64)

    def loss() -> Tensor:
        with _products(trainer.precision):
            return of_examples(model, tokens, tokens, None, labels)[0]

    heads = [part for name, part in model.named_children() if name != model.base_model_prefix]
    return Built(settings, 1, model, heads, loss)


@contextmanager
def _staying() -> Iterator[None]:
    """Let modules stay where they are: fake weights cannot be moved, and peft moves its own to where they are."""
    move = nn.Module._apply
    nn.Module._apply = lambda module, *_, **__: module
    try:
        yield
    finally:
        nn.Module._apply = move


def _products(precision: str) -> torch.autocast:
    """The context of forward passes; `auto` counts as fp32."""
    half = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast("cpu", dtype=half, enabled=precision in ("bf16", "fp16"))
