"""LLaMA decoders with random weights."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from adafrugal.settings.schema import LlamaSettings

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

_CAUSAL = "causal_sdpa"  # torch's fused attention under a name for which transformers makes no mask


def build(settings: LlamaSettings, padding: int | None = 0) -> LlamaForCausalLM:
    """Build a LLaMA of the given shape: untied head, rotary positions, RMSNorm, SiLU, torch's fused attention.

    Weights have the type `settings.dtype` and are drawn from torch's global generator: seed it first.

    Args:
        settings: the shape.
        padding: the id whose embedding stays zero; None if no id is for padding alone.
    """
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig
    from transformers.utils import logging

    logging.disable_progress_bar()  # else every checkpoint draws one
    shape = asdict(settings)
    others = ("kind", "vocabulary_size", "dtype", "loss_chunk_rows", "weights", "revision")
    ours = {name: shape.pop(name) for name in others}
    config = LlamaConfig(
        vocab_size=ours["vocabulary_size"], **shape, tie_word_embeddings=False, use_cache=False,
        attn_implementation="sdpa", pad_token_id=padding, eos_token_id=1, bos_token_id=None,  # ids as T5's
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, settings.dtype))


def attend_causally(model: LlamaForCausalLM) -> None:
    """Make attention causal without a mask, for rows of one text each, padded at the end.

    transformers checks the positions of each batch for several texts in a row, for which a GPU has to wait; in compiled
    code it makes a mask (rows, 1, length, length) instead, which needs a slower kernel of attention. Where it makes
    none, results are the same to the bit.
    """
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register(_CAUSAL, sdpa_attention_forward)
    model.set_attn_implementation(_CAUSAL)
