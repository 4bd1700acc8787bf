"""Pretrained encoders with a new head for classes or scores, and their tokenizers."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adafrugal.settings.schema import EncoderSettings
from adafrugal.system.errors import SettingError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load(settings: EncoderSettings, outputs: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """The encoder with its pretrained weights in float32, its tokenizer, and a fingerprint of the encoder's weights.

    A head or a pooler that the weights lack is drawn from torch's global generator: seed it first.

    Args:
        settings: where the encoder is.
        outputs: of the head: classes, or 1 for a score.

    Raises:
        SettingError: the weights lack some of the encoder's.
        Exception: whatever transformers raises where it or the hub cannot give such a model.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # it tells which weights are new; what is wrong of it is said below
    place = _place(settings)
    tokenizer = AutoTokenizer.from_pretrained(place, revision=settings.revision)
    model, found = AutoModelForSequenceClassification.from_pretrained(
        place, revision=settings.revision, num_labels=outputs, dtype=torch.float32, output_loading_info=True,
        ignore_mismatched_sizes=True,
    )  # fmt: skip
    _refuse_missing_weights(model, found, str(settings.name or settings.package))
    return model, tokenizer, _fingerprint(model, found["missing_keys"])


def longest_input(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The number of tokens that the encoder takes at most."""
    positions = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    longest = int(tokenizer.model_max_length)  # astronomical where the tokenizer does not know
    if positions is None:
        return longest
    # RoBERTa and MPNet count positions from after their padding index
    return min(longest, positions.num_embeddings - (-1 if positions.padding_idx is None else positions.padding_idx) - 1)


def _fingerprint(model: PreTrainedModel, new: set[str]) -> str:
    """The same for the same pretrained weights; the head, and what else is new, is left out."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.base_model.state_dict().items()):
        if f"{model.base_model_prefix}.{name}" not in new:
            digest.update(name.encode())
            digest.update(tensor.contiguous().view(-1).numpy().tobytes())
    return digest.hexdigest()


def _place(settings: EncoderSettings) -> str:
    if settings.package is None:
        return str(settings.name)
    found = find_spec(settings.package)
    if found is None or found.origin is None:  # checked before; gone since
        raise SettingError(f"model.package is {settings.package}, which is not installed")
    return str(Path(found.origin).parent / "model")


def _refuse_missing_weights(model: PreTrainedModel, found: dict[str, Any], name: str) -> None:
    """A new head is as it should be; anything else that is new would be trained from nothing."""
    base = f"{model.base_model_prefix}."
    new = [*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])]
    lost = sorted(key for key in new if key.startswith(base) and ".pooler." not in key)
    if lost:
        raise SettingError(
            f"model.name is {name}, whose weights lack {len(lost)} of the encoder's tensors, such as {lost[0]}; "
            "allowed: a pretrained encoder of the architecture that its config.json names"
        )
