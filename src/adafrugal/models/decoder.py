"""Decoders that transformers reads: their shape, their weights, and what they need to be trained here."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adafrugal.settings.schema import DecoderSettings, LlamaSettings, Settings
from adafrugal.system.errors import SettingError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedConfig, PreTrainedModel

_SHAPE = {  # of a LLaMA's config.json -> the setting
    "vocab_size": "vocabulary_size", "hidden_size": "hidden_size", "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_hidden_layers", "num_attention_heads": "num_attention_heads",
    "rms_norm_eps": "rms_norm_eps",
}  # fmt: skip
_FIXED = ("model_type", "num_key_value_heads", "hidden_act", "attention_bias", "mlp_bias", "rope_parameters",
          "tie_word_embeddings")  # fmt: skip


def sized(settings: Settings) -> Settings:
    """Return the settings with a decoder's vocabulary size, as its config.json says.

    Raises:
        SettingError: the decoder takes fewer positions than `trainer.sequence_length`.
        Exception: of transformers or the hub, if its config.json cannot be read.
    """
    model = settings.model
    if not isinstance(model, DecoderSettings):
        return settings
    found = config(model)
    longest = getattr(found, "max_position_embeddings", None) or settings.trainer.sequence_length
    settings.trainer.need(
        settings.trainer.sequence_length <= longest, "sequence_length", f"up to the decoder's positions ({longest})"
    )
    return replace(settings, model=replace(model, vocabulary_size=found.vocab_size))


def config(settings: DecoderSettings) -> PreTrainedConfig:
    """Read a decoder's config.json."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(settings.name, revision=settings.revision)


def build(settings: DecoderSettings, reads: bool) -> PreTrainedModel:
    """Build a decoder in float32, with its weights, or with random ones, drawn from torch's global generator.

    Args:
        settings: where it is.
        reads: whether to read its weights, if the settings ask for them.

    Raises:
        SettingError: weights are missing, or logits are not the head's of the hidden states, as the loss here needs.
        Exception: of transformers or the hub, if it cannot be read.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    shape = config(settings)
    shape.use_cache = False
    model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
    if settings.pretrained and reads:
        _read(model, "model.name", str(settings.name), settings.revision)
    _refuse_other_logits(model)
    return model


def read_weights(model: LlamaForCausalLM, settings: LlamaSettings) -> None:
    """Give a LLaMA the weights that `model.weights` names.

    Raises:
        SettingError: they have another shape.
        Exception: of transformers or the hub, if they cannot be read.
    """
    from transformers import AutoConfig

    theirs = AutoConfig.from_pretrained(settings.weights, revision=settings.revision)
    for name in (*_SHAPE, *_FIXED):
        ours, found = getattr(model.config, name, None), getattr(theirs, name, None)
        if ours != found:
            given = f"model.weights is {settings.weights}, whose {name} is {found}, and the model has {ours}"
            other = "model=decoder model.name=…, which takes any decoder"
            raise SettingError(f"{given}; allowed: {f'model.{_SHAPE[name]}={found}' if name in _SHAPE else other}")
    _read(model, "model.weights", str(settings.weights), settings.revision)


def _read(model: PreTrainedModel, setting: str, place: str, revision: str | None) -> None:
    """Copy the weights at a place into a model of their shape."""
    from transformers import AutoModelForCausalLM

    found, about = AutoModelForCausalLM.from_pretrained(
        place, revision=revision, dtype=next(model.parameters()).dtype, output_loading_info=True
    )
    if lost := sorted(about["missing_keys"]):
        lacks = f"whose weights lack {len(lost)} tensors, such as {lost[0]}"
        raise SettingError(f"{setting} is {place}, {lacks}; allowed: those of a whole model, as save_pretrained writes")
    model.load_state_dict(found.state_dict())


def _refuse_other_logits(model: PreTrainedModel) -> None:
    """Refuse a decoder whose logits are more than its head's of the last hidden states, such as capped ones."""
    import torch

    tokens, head = torch.arange(4)[None] % model.config.vocab_size, model.get_output_embeddings()
    is_training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits
        states = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        ours = logits.new_zeros(()) if head is None else head(states)
    model.train(is_training)
    if ours.shape != logits.shape or not torch.allclose(ours, logits, rtol=1e-4, atol=1e-5):
        raise SettingError(
            f"model.name is a {type(model).__name__}, whose logits are not its head's of the hidden states; allowed: a "
            "decoder without scaled or capped logits, such as GPT-2, LLaMA, Mistral or Qwen2"
        )


def fingerprint(place: str) -> str | None:
    """Return a hash of the weights in a directory, by their files; None where there is no directory."""
    files = sorted(file for file in Path(place).glob("*") if file.suffix in (".safetensors", ".bin"))
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            digest.update(file.name.encode() + hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest() if files else None


def weights_of(settings: Any) -> str | None:
    """Return the place of the weights with which a model begins; None for random ones."""
    if isinstance(settings, DecoderSettings):
        return settings.name if settings.pretrained else None
    place: str | None = settings.weights
    return place
