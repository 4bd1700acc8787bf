"""A LLaMA of two layers as transformers makes it, its rows, and Frugal's options for a run of a few steps."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from adafrugal.optim import LinearDecay, LossAware


def llama():
    torch.manual_seed(0)
    shape = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, max_position_embeddings=16))


def rows(count, length=8):
    """Rows of which a part counts, from one token to all."""
    drawn = torch.randint(32, (count, length), generator=torch.Generator().manual_seed(count))
    return [{"input_ids": row, "labels": row.clone().index_fill_(0, torch.arange(i % length), -100)}
            for i, row in enumerate(drawn)]  # fmt: skip


def adafrugal(**changed):
    """ρ falls at every step; T grows at each observation but the first."""
    interval = LossAware(1, 50, factor=3.0, threshold=1e9, every=2)
    return {
        "lr": 0.01,
        "density": LinearDecay(0.6, 0.1, steps=8),
        "interval": interval,
        "subspace": "columns",
    } | changed
