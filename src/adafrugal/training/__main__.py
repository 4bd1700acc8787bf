"""`python -m adafrugal.training CHECKPOINT DIRECTORY`: convert a sharded checkpoint to whole tensors.

transformers' `from_pretrained` reads that form. Training continues from either form, on any number of processes.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from adafrugal.settings.command_line import Parser
from adafrugal.system.errors import DONE, WRONG, SettingError, TrainingError
from adafrugal.system.stderr import tell


def main() -> int:
    """Convert; return 2 if the checkpoint cannot be converted or the directory exists."""
    parser = Parser(
        prog="python -m adafrugal.training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="such as runs/…/checkpoints/step-00000500")
    parser.add_argument("directory", type=Path, help="to create")
    try:
        given = parser.parse_args()
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
        raise SettingError(f"{source} has whole tensors already; allowed: a checkpoint of trainer.parallel=fsdp")
    if target.exists():
        raise SettingError(f"{target} exists; name a new directory")
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    from adafrugal.training.checkpoints import checkpoint, sharded

    logging.disable_progress_bar()
    if damage := checkpoint.damage(source):
        raise TrainingError(f"the checkpoint {source} is damaged ({damage})")
    config = AutoConfig.from_pretrained(source)
    model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    sharded.read_model(source, model)
    scratch, state = checkpoint.scratch(target), sharded.whole(checkpoint.load_state(source), source)

    def fill() -> None:
        scratch.mkdir(parents=True)
        model.save_pretrained(scratch)
        written = {"state.pt", checkpoint.CHECKSUMS, *(file.name for file in scratch.iterdir())}
        for file in source.iterdir():  # the tokenizer and the model card
            if file.suffix != ".safetensors" and file.name not in written:
                shutil.copyfile(file, scratch / file.name)

    checkpoint.save(target, fill, state)


if __name__ == "__main__":
    sys.exit(main())
