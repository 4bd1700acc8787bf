"""`python -m adafrugal.training CHECKPOINT DIRECTORY`: a checkpoint in shards as one that a single process writes.

That form is what transformers' `from_pretrained` reads. Training goes on from either form, on any number of processes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from adafrugal.system.errors import DONE, WRONG, SettingError, TrainingError
from adafrugal.system.stderr import tell


def main() -> int:
    """Convert; 2 where there is nothing to convert, or something is there already."""
    parser = argparse.ArgumentParser(
        prog="python -m adafrugal.training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="such as runs/…/checkpoints/step-00000500")
    parser.add_argument("directory", type=Path, help="that is made")
    given = parser.parse_args()
    try:
        _convert(given.checkpoint, given.directory)
    except (SettingError, TrainingError) as error:
        tell(f"error: {error}")
        return WRONG
    sys.stdout.write(f"{given.checkpoint} → {given.directory}\n")
    return DONE


def _convert(source: Path, target: Path) -> None:
    if not (source / "state.pt").exists():
        raise SettingError(f"{source} is no checkpoint; allowed: a directory step-… of a run's checkpoints")
    if (source / "model.safetensors").exists():
        raise SettingError(f"{source} is in the form already that a single process writes")
    if target.exists():
        raise SettingError(f"{target} exists; name a directory that is to be made")
    from adafrugal.training.checkpoints import checkpoint

    checkpoint.gather(source, target)


if __name__ == "__main__":
    sys.exit(main())
