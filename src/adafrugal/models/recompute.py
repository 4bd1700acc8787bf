"""Activation checkpointing: recompute a block's activations in the backward pass instead of keeping them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from adafrugal.system.errors import SettingError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_aten = torch.ops.aten
_KEPT = {  # by `selective`: the operations that take most of the time
    _aten.mm.default,
    _aten.bmm.default,
    _aten.addmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}


def checkpoint_activations(model: PreTrainedModel, which: str) -> None:
    """Let the blocks of a transformers model keep fewer activations; gradients stay the same to the bit.

    Args:
        model: in training mode.
        which: "layers" keeps a block's input alone (Chen et al., arXiv 1604.06174); "selective" keeps the results of
            matrix products and attention too; "none" keeps all.

    Raises:
        SettingError: the model does not support it.
    """
    if which == "none":
        return
    if not model.supports_gradient_checkpointing:
        given = f"trainer.activation_checkpointing is {which}"
        raise SettingError(f"{given}; allowed: none, since {type(model).__name__} keeps what its layers compute")
    contexts = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)} if which == "selective" else {}
    # gradient_checkpointing_enable: its name before transformers 5.23
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, **contexts})


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
