"""LLaMA decoders with random weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adafrugal.config import LlamaSettings

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


def build(settings: LlamaSettings) -> LlamaForCausalLM:
    """A LLaMA of the given shape: untied head, rotary positions, RMSNorm, SiLU, torch's fused attention.

    Weights are of the type that the settings say, drawn from torch's global generator: seed it first.
    """
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig
    from transformers.utils import logging

    logging.disable_progress_bar()  # else every checkpoint draws one
    return AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=settings.vocabulary_size,
            hidden_size=settings.hidden_size,
            intermediate_size=settings.intermediate_size,
            num_hidden_layers=settings.num_hidden_layers,
            num_attention_heads=settings.num_attention_heads,
            max_position_embeddings=settings.max_position_embeddings,
            rms_norm_eps=settings.rms_norm_eps,
            initializer_range=settings.initializer_range,
            tie_word_embeddings=False,
            use_cache=False,
            attn_implementation="sdpa",
            # the tokenizers' ids, as T5 has them
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        ),
        dtype=getattr(torch, settings.dtype),
    )
