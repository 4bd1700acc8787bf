"""Pretrained encoders with a new head for classes or scores, and their tokenizers."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adafrugal.settings.schema import EncoderSettings
from adafrugal.system.errors import SettingError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def load(settings: EncoderSettings, outputs: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """Load an encoder in float32 and its tokenizer, with a fingerprint of the pretrained weights.

    The head, and a pooler that the weights lack, are drawn from torch's global generator: seed it first.

    Args:
        settings: where the encoder is.
        outputs: of the head: classes, or 1 for a score.

    Raises:
        SettingError: weights of the encoder are missing, which would be trained from random values.
        Exception: of transformers or the hub, if the model cannot be loaded.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # it lists new weights; `load` refuses those that matter
    place = _place(settings)
    tokenizer = AutoTokenizer.from_pretrained(place, revision=settings.revision)
    model, found = AutoModelForSequenceClassification.from_pretrained(
        place, revision=settings.revision, num_labels=outputs, dtype=torch.float32, output_loading_info=True,
        ignore_mismatched_sizes=True,
    )  # fmt: skip
    base = f"{model.base_model_prefix}."
    new = [*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])]
    lost = sorted(key for key in new if key.startswith(base) and ".pooler." not in key)
    if lost:
        raise SettingError(
            f"model.name is {settings.name or settings.package}, whose weights lack {len(lost)} of the encoder's "
            f"tensors, such as {lost[0]}; allowed: a pretrained encoder of the architecture that its config.json names"
        )
    digest = hashlib.sha256()
    for name, tensor in sorted(model.base_model.state_dict().items()):
        if base + name not in found["missing_keys"]:
            digest.update(name.encode())
            digest.update(tensor.contiguous().view(-1).numpy().tobytes())
    return model, tokenizer, digest.hexdigest()


def build(settings: EncoderSettings, outputs: int) -> PreTrainedModel:
    """Build an encoder as `load` does, in training mode, with random weights: only its config.json is read.

    Args:
        settings: where the encoder is.
        outputs: of the head: classes, or 1 for a score.

    Raises:
        Exception: of transformers or the hub, if its config.json cannot be read.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_config(config(settings, num_labels=outputs), dtype=torch.float32)


def config(settings: EncoderSettings, **more: Any) -> PreTrainedConfig:
    """Read an encoder's config.json."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(_place(settings), revision=settings.revision, **more)


def _place(settings: EncoderSettings) -> str | None:
    """A directory, or a hub repository."""
    if settings.package is None:
        return settings.name
    package = find_spec(settings.package)
    if package is None or package.origin is None:  # removed since the settings were checked
        raise SettingError(f"model.package is {settings.package}, which is not installed")
    return str(Path(package.origin).parent / "model")


def longest_input(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest number of tokens that the encoder takes."""
    positions = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    longest = int(tokenizer.model_max_length)  # a huge number if the tokenizer does not know it
    if positions is None:
        return longest
    # RoBERTa and MPNet count positions from after their padding index
    return min(longest, positions.num_embeddings - (-1 if positions.padding_idx is None else positions.padding_idx) - 1)
