"""LLaMA decoders with random weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adafrugal.settings.schema import LlamaSettings

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

_CAUSAL = "causal_sdpa"  # torch's fused attention under a name for which transformers makes no mask


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


def attend_causally(model: LlamaForCausalLM) -> None:
    """Let attention be causal without a mask, in a model whose rows are one text each.

    transformers looks at the positions of each batch for several texts in a row, and a GPU waits for the answer; in
    compiled code it does not look but makes a mask [rows, 1, length, length], with which attention has a slower
    kernel. Results are the same to the bit where no mask was made. Padding has to follow the text.
    """
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register(_CAUSAL, sdpa_attention_forward)
    model.set_attn_implementation(_CAUSAL)
