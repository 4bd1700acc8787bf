"""Estimate the memory of a run before it is started: nothing of the model is allocated, no GPU is needed.

    python -m adafrugal.memory model=llama_1b optimizer=adafrugal trainer.precision=bf16
    python -m adafrugal.memory model=llama_1b optimizer=adamw,galore,frugal,adafrugal      several, side by side
    python -m adafrugal.memory model=llama_1b optimizer=adafrugal --fits 16GB              what fits on a card of 16 GB
    python -m adafrugal.memory model=llama_1b optimizer=adafrugal --fits 14.5              in 14.5 GiB of tensors
    python -m adafrugal.memory model=llama_7b trainer.parallel=fsdp --processes 4          one of four processes

The settings are train.py's; the largest micro-batch that fits is a divisor of trainer.batch_size. If it is all of that,
a larger one may fit, too, which is said. --fits makes a dozen estimates. Of a card that is sold as 16 GB it takes
15.5 GiB, which is what torch sees of it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from adafrugal.settings import compose
from adafrugal.settings.command_line import Parser
from adafrugal.system import threads
from adafrugal.system.errors import DONE, WRONG, SettingError
from adafrugal.system.stderr import tell


def main(arguments: Sequence[str]) -> int:
    """Print estimates; return the exit code: 0, or 2 for a wrong setting."""
    threads.wait_asleep()
    parser = Parser(
        prog="python -m adafrugal.memory", description=__doc__, beside_settings=True,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("settings", nargs="*", metavar="name=value")
    parser.add_argument("--processes", type=int, metavar="N", help="estimate one of so many that share the run")
    parser.add_argument("--fits", metavar="SIZE", help="say which micro-batch and which ρ fit: 16GB, or GiB of tensors")
    try:
        given = parser.parse_intermixed_args(arguments)
        _print(given)
    except SettingError as error:
        tell(f"error: {error}")
        return WRONG
    return DONE


def _print(given: argparse.Namespace) -> None:
    others = [word for word in given.settings if not word.startswith("optimizer=")]
    named = [word.partition("=")[2].split(",") for word in given.settings if word.startswith("optimizer=")]
    each = [[f"optimizer={name}", *others] for name in named[0]] if named else [others]
    runs = [compose.settings(words) for words in each]
    for settings in runs if given.processes is not None else ():
        settings.trainer.refuse_processes(given.processes, f"--processes is {given.processes}")
    from adafrugal.memory import breakdown, card, fit
    from adafrugal.memory.built import met
    from adafrugal.memory.estimate import estimate

    budget = card.of_words(given.fits) if given.fits is not None else None
    if budget is not None:
        arms = ", ".join(str(settings.arm) for settings in runs)
        tell(f"making about a dozen estimates of {arms} to find what fits: minutes if the model is large")
    with met(given.processes):
        for place, settings in enumerate(runs):
            if card.of_settings(settings) is not None:
                found = fit.fitted(settings)
                runs[place] = fit.beginning_with(settings, found.density)
                sys.stdout.write(breakdown.chosen(settings, found) + "\n")
        sys.stdout.write(breakdown.text([(settings, estimate(settings)) for settings in runs]))
        for settings in runs if budget is not None else ():
            sys.stdout.write(breakdown.what_fits(settings, budget))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
