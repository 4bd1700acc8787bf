"""Evaluate a checkpoint as its run does.

    python -m adafrugal.training.evaluate runs/…/checkpoints/step-00000500    loss, perplexity, bits per byte
    python -m adafrugal.training.evaluate runs/…                              of the run's newest checkpoint
    python -m adafrugal.training.evaluate runs/… data=text data.source=a.txt  on another text
    python -m adafrugal.training.evaluate runs/… --json                       one line of JSON, every digit

Data and settings are those of the run's record, except what is typed as for train.py, and the evaluation is the one
that ends a run (eval.last_tokens). Other data are read with the checkpoint's own tokenizer, of them the validation
split. Nothing is written into the run.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from adafrugal.settings import checkpoint_names, compose, explain
from adafrugal.settings.command_line import no_option
from adafrugal.settings.schema import Settings
from adafrugal.system import threads
from adafrugal.system.errors import DONE, SettingError
from adafrugal.system.stderr import tell
from adafrugal.tracking.record import Record, spoken
from adafrugal.training.failure import classify

TAKEN = (  # what may be typed for every task
    "data", "cache_root", "trainer.device", "trainer.precision", "trainer.sequence_length", "trainer.batch_size",
    "trainer.micro_batch_size",
)  # fmt: skip
OF_TRAINING = ("data.seed", "data.repeat", "data.examples")  # which change no validation split
_PLACES = "a run's directory, or a step-… of its checkpoints"
OTHERWISE = ("data.processes", "data.store_limit_gib")  # settings of the same data


def main(arguments: Sequence[str]) -> int:
    """Print the numbers; return the exit code, as train.py's."""
    threads.wait_asleep()
    given = [argument for argument in arguments if argument != "--json"]
    if {"-h", "--help"} & set(given):
        sys.stdout.write(__doc__)
        return DONE
    try:
        if other := next((word for word in given if word.startswith("-")), None):
            raise SettingError(no_option(other, ["--json", "--help"], beside_settings=True))
        if not given:
            raise SettingError(f"no checkpoint is given; allowed: {_PLACES}; see --help")
        found = evaluate(Path(given[0]), given[1:])
    except (Exception, KeyboardInterrupt) as error:
        end = classify(error)
        tell(end.text)
        return end.code
    if "--json" in arguments:
        sys.stdout.write(json.dumps(found) + "\n")
        return DONE
    shown = {spoken(name): f"{value:.4f}" if isinstance(value, float) else value for name, value in found.items()}
    sys.stdout.write("".join(f"{name:<18} {value}\n" for name, value in shown.items()))
    return DONE


def evaluate(place: Path, words: Sequence[str] = ()) -> dict[str, Any]:
    """Evaluate a checkpoint, or a run's newest, and return what was evaluated with the numbers `validation_…`.

    Args:
        place: a directory step-…, or a run's, or its checkpoints.
        words: of train.py, which exchange settings of the run's record.

    Raises:
        SettingError: no checkpoint, a wrong setting, or missing data; the message is one line.
    """
    directory, record = _found(place)
    settings, is_same = _settings(directory, record, words)
    from adafrugal.memory import on_device
    from adafrugal.models import optimizers
    from adafrugal.training import devices, tasks
    from adafrugal.training.checkpoints import checkpoint, sharded

    if damage := checkpoint.damage(directory):
        raise SettingError(f"the checkpoint {directory} is damaged ({damage}); name another")
    state = checkpoint.load_state(directory)
    if not any(word.startswith("trainer.precision=") for word in words):  # a run keeps its first
        settings = replace(settings, trainer=replace(settings.trainer, precision=state["precision"]))
    device = devices.open_device(settings.trainer, warn=tell)
    settings = on_device.resolved(tasks.sized(settings), device.precision, device.memory(), device.free())
    task = tasks.named(settings.task.kind)(settings, device, tell, state["task"] if is_same else None)
    try:
        _refuse_another_tokenizer(task.data, record)
        optimizers.adapt(settings, task.model)  # LoRA's adapters
        sharded.read_model(directory, task.model)
        numbers = task.evaluate(last=True)
    finally:
        task.close()
    source = task.data["source"]
    data = " ".join(str(source[key]) for key in ("name", "subset") if source.get(key))
    about = {"checkpoint": str(directory), "step": state["account"]["step"], "data": data}
    return {**about, "fingerprint": task.data["fingerprint"], **numbers}


def _found(place: Path) -> tuple[Path, Record]:
    """Find the checkpoint, and the record of its run."""
    here = place.resolve()
    inside = sorted(checkpoint_names.run_of(str(place)).glob("checkpoints/step-*"))
    if not (here / "state.pt").exists() and not inside:
        raise SettingError(_no_checkpoint(place))
    directory = inside[-1] if inside else here
    record = Record(directory.parent.parent)
    if not (record.directory / "config.yaml").exists() or "identity" not in (record.environment() or {}):
        needed = "config.yaml and environment.json, which name its data and model"
        raise SettingError(f"{directory} is not in a run's directory with {needed}; evaluate it where its run was made")
    return directory, record


def _no_checkpoint(place: Path) -> str:
    """Say what is at a place instead of a checkpoint."""
    if checkpoint_names.is_checkpoint(str(place)):
        there = ", ".join(path.name for path in sorted(place.parent.glob("step-*")) if path != place)
        what = "is not whole" if place.exists() else "does not exist"
        return f"{place} {what}; allowed: {there or 'a checkpoint of another run, since there are none'}"
    run = Record(checkpoint_names.run_of(str(place)))
    if run.status is not None:
        reason = f" ({run.reason})" if run.reason else ""
        return f"{place} is of a run without a checkpoint, whose status is {run.status}{reason}; allowed: {_PLACES}"
    what = "is no checkpoint" if place.exists() else "does not exist"
    return f"{place} {what}; allowed: {_PLACES}"


def _settings(directory: Path, record: Record, words: Sequence[str]) -> tuple[Settings, bool]:
    """Return the record's settings with those that the words name, and whether the data are the run's."""
    names = [word.partition("=")[0] for word in words]
    config, given = record.config(), _composed(record, [word for word in words if "=" in word])
    _refuse_without_effect(words, config | {"eval": given["eval"]} if "eval.last_tokens" in names else config)
    before = copy.deepcopy(config["data"])
    config |= {name: given[name] for name in ("run_root", "cache_root")}
    for name in sorted(names):  # a group before its settings
        *groups, last = name.split(".")
        there, new = config, given
        for group in groups:
            there, new = there[group], new[group]
        there[last] = new[last]
    is_same = all(not name.startswith("data") or name in OTHERWISE for name in names)
    if not is_same and "tokenizer" in before and "tokenizer" in config["data"]:
        config["data"]["tokenizer"] = _tokenizer(directory, names, before["tokenizer"], config["data"]["tokenizer"])
    found = compose.recorded(config)
    if found.model.kind == "llama":
        found.model.weights = found.model.revision = None  # it has its own now
    elif found.model.kind == "decoder":
        found.model.name, found.model.revision, found.model.pretrained = str(directory), None, False
    if (classes := getattr(found.data, "classes", None)) != before.get("classes"):
        raise SettingError(f"data.classes is {classes}; allowed: {before['classes']}, as the checkpoint's head has")
    alone = {"parallel": "none", "replicas": 1, "offload": False, "update_in_backward": False}
    if found.task.kind == "pretrain":  # a batch is enough of the training text
        alone["steps"], found.data.repeat = 1, True
    return replace(found, trainer=replace(found.trainer, **alone)), is_same


def _refuse_without_effect(words: Sequence[str], config: Mapping[str, Any]) -> None:
    """Refuse words that change nothing of an evaluation of this task, with these settings of `eval`."""
    if config["model"]["kind"] == "encoder":  # whose files may have moved, and whose validation splits are read whole
        own = ["model.name", "model.revision", "model.package"]
    else:
        own = ["eval.last_tokens", *(["eval.tokens"] if config["eval"].get("last_tokens") is None else [])]
    for word in words:
        name = word.partition("=")[0]
        is_taken = any(name == taken or name.startswith(f"{taken}.") for taken in (*TAKEN, *own))
        if "=" not in word or not is_taken or name in OF_TRAINING:
            allowed = f"{', '.join((*TAKEN, *own))}, as name=value, without {', '.join(OF_TRAINING)}"
            raise SettingError(f"{word} changes no evaluation; allowed: {allowed}")


def _composed(record: Record, words: Sequence[str]) -> dict[str, Any]:
    """Compose the words with the files that the run chose, so that a wrong word is refused as by train.py."""
    labels = record.environment()["identity"]["labels"]
    is_other = any(word.startswith("data=") for word in words)
    chosen = [f"{group}={labels[group]}" for group in ("task", "model", *([] if is_other else ["data"]))]
    found, _, _ = compose.composed([*chosen, *words])
    try:
        return OmegaConf.to_container(found, resolve=True)
    except OmegaConfBaseException as error:
        raise SettingError(explain.explain(error)) from error


def _tokenizer(directory: Path, names: Sequence[str], before: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the checkpoint's own tokenizer, or of the given one if the checkpoint has none."""
    typed = next((name for name in names if name.startswith("data.tokenizer")), None)
    if not (directory / "tokenizer.json").exists():
        if typed is None:
            needed = "data.tokenizer.kind=… and data.tokenizer.name=… of the run's"
            raise SettingError(f"{directory} has no tokenizer, since an older version wrote it; add {needed}")
        return given
    if typed is not None:
        raise SettingError(f"{typed} is given, but a checkpoint is evaluated with its own tokenizer; leave that out")
    model = directory / "tokenizer.model"
    kind, name = ("sentencepiece", model) if model.exists() else ("pretrained", directory)
    return before | {"kind": kind, "name": str(name), "vocabulary_size": None}


def _refuse_another_tokenizer(data: dict[str, Any], record: Record) -> None:
    """Refuse a tokenizer that is typed for an older checkpoint and is not the run's."""
    ours, theirs = (about.get("tokenizer", {}) for about in (data, record.environment()["data"]))
    if ours.get("size") != theirs.get("size"):
        raise SettingError(
            f"data.tokenizer has {ours['size']:,} ids, and the checkpoint's run had {theirs['size']:,}; name the run's"
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
