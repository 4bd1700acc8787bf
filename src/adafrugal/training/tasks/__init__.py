"""The tasks of a run: pre-training and fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adafrugal.settings.schema import Settings
    from adafrugal.training.tasks.task import Task


def named(kind: str) -> type[Task]:
    """Return the class of a task of the settings, pretrain or finetune."""
    if kind == "pretrain":
        from adafrugal.training.tasks.pretrain import Pretrain

        return Pretrain
    from adafrugal.training.tasks.finetune import Finetune

    return Finetune


def sized(settings: Settings) -> Settings:
    """The settings with what a decoder's config.json decides."""
    if settings.model.kind != "decoder":
        return settings
    from adafrugal.training.tasks import pretrain

    return pretrain.sized(settings)
