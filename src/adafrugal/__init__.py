"""AdaFRUGAL: memory-efficient training of language models. The optimizer is in `adafrugal.optim`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adafrugal.tracking.record import Record


def train(settings: Sequence[str]) -> Record:
    """Make the run that train.py makes of the same words, or continue it, in this process; return its record.

    For scripts that bring parts of their own (`adafrugal.optim.register`). It needs a checkout, with its settings.

    Args:
        settings: words as after train.py, such as `["optimizer=adafrugal", "trainer.steps=100"]`, without `-m`.

    Raises:
        SettingError: a wrong setting or a missing input; nothing was run.
        TrainingError: the run failed; the record says why.
        KeyboardInterrupt: a signal arrived before training. One during training ends the run after its step: then
            `record.status` is "interrupted", and the same call continues it.
    """
    from adafrugal.settings import compose, naming
    from adafrugal.training import session

    composed, choices, _ = compose.composed(settings)
    checked = compose.check(composed, choices)
    naming.name_run(checked, settings)
    record, _ = session.run(checked, choices)
    return record
