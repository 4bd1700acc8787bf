"""Which run a pattern means from which a run goes on: `trainer.continue_from=runs/…/adafrugal-*`."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from adafrugal.settings import checkpoint_names
from adafrugal.settings.identity import CONTINUE_FROM, beside, differing, identify
from adafrugal.settings.past import another_past
from adafrugal.settings.schema import Settings
from adafrugal.system.errors import SettingError


def choose_source(
    settings: Settings, choices: Mapping[str, str], recorded: Callable[[Mapping[str, Any]], Settings]
) -> None:
    """Replace a pattern in `trainer.continue_from` by the one run, or checkpoint, that it means for these settings.

    It is the one with which a run of these settings began before, else the one that has the past of this run.

    Args:
        settings: of the run.
        choices: group -> the chosen file.
        recorded: reads the settings of a config.yaml.

    Raises:
        SettingError: there is none, or there are several.
    """
    pattern = settings.trainer.continue_from
    if pattern is None or not glob.has_magic(pattern):
        return
    settings.trainer.continue_from = None
    alike = beside(identify(settings, choices), differing(settings), CONTINUE_FROM)
    keys = {checkpoint_names.key(theirs[CONTINUE_FROM]) for _, theirs in alike if CONTINUE_FROM in theirs}
    run = _run(pattern)
    if keys := {key for key in keys if fnmatch(key, run.name)}:  # its directory may be gone, and others have come
        found = [str(run.with_name(key) / Path(pattern).relative_to(run)) for key in sorted(keys)]
    else:
        found = list(_with_its_past(settings, pattern, recorded))
    if len(found) > 1:
        several = f"from which this run may go on are several: {', '.join(found)}"
        raise SettingError(f"{CONTINUE_FROM} is {pattern}, and {several}; name one, or a step: …/checkpoints/step-…")
    settings.trainer.continue_from = found[0]


def _run(place: str) -> Path:
    """Return the directory of a run from its path, or from that of a checkpoint; either may be a pattern."""
    found = Path(place)
    return found.parents[1] if found.parent.name == "checkpoints" else found


def _with_its_past(
    settings: Settings, pattern: str, recorded: Callable[[Mapping[str, Any]], Settings]
) -> Iterator[str]:
    """Yield the runs, or checkpoints, of a pattern that have the past of these settings.

    Raises:
        SettingError: there is none.
    """
    others: list[tuple[bool, int, str]] = []  # is it the length alone, settings that differ, why it is not continued
    is_found, ours = False, differing(settings)
    for place in sorted(glob.glob(pattern)):  # noqa: PTH207 - may be absolute
        run = _run(place)
        inside = [place] if run != Path(place) else map(str, run.glob("checkpoints/step-*"))
        steps = [checkpoint_names.step(path) for path in inside if checkpoint_names.is_checkpoint(path)]
        theirs = checkpoint_names.recorded(run).get("identity", {}).get("differs")
        if not (steps and theirs):
            continue
        with suppress(SettingError, OSError):  # a run of a version that had other settings
            config = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
            why = another_past(settings, recorded(config), max(steps))
            is_found = is_found or why is None
            if why is None:
                yield place
            else:
                count = sum(ours.get(name, ...) != theirs.get(name, ...) for name in {*ours, *theirs})
                reason = re.sub("; allowed: .*", "", why)
                others.append((why.startswith("trainer.steps "), count, f"{run.name}: {reason}"))
    if not is_found:
        nearest = f", such as {min(others)[-1]}" if others else ""
        what = f"none of its {len(others)} runs with checkpoints has the past of this run{nearest}"
        raise SettingError(f"{CONTINUE_FROM} is {pattern}, and {what}; allowed: runs of the same settings up to there")
