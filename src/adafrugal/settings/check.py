"""The check that each run passes before anything is read or built, and the line that a wrong setting gets.

Composition gives every value its type; `check` refuses what it lets through (keys added with `+`, impossible
values) and returns typed `Settings`. `explain` makes one line of what composition itself refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from adafrugal.optim import controls
from adafrugal.optim.choices import SUBSPACES
from adafrugal.settings.schema import Settings, is_plain_name, run_steps, trained_size, with_run_length
from adafrugal.settings.validate import UNIONS, nearest, refuse_impossible, refuse_uninstalled
from adafrugal.system import secrets
from adafrugal.system.errors import SettingError

_REPOSITORY = Path(__file__).resolve().parents[3]
_PLACES = ("experiments", "sweeps")  # beside conf/; their groups have groups in them


def groups(repository: Path) -> str:
    """The groups that can be chosen from and their files, a line each, for `--help`."""
    found: dict[str, list[str]] = {}
    for root, place in (("conf", "conf"), *((".", place) for place in _PLACES)):
        for file in _choices(place, repository):
            group = file.parent.relative_to(repository / root).as_posix()
            if group != "." and not group.startswith(("optimizer/for", "optimizer/at")):  # they come by themselves
                found.setdefault(group, []).append(file.stem)
    return "\n".join(f"  {group}: {', '.join(names)}" for group, names in found.items())


def _choices(place: str, repository: Path = _REPOSITORY) -> list[Path]:
    """The settings files of a directory that can be chosen by name; what begins with _ is a part of others."""
    ours = ("experiments/published", "experiments/results", "experiments/tables")
    files = [file for file in sorted((repository / place).rglob("*.yaml")) if not file.stem.startswith("_")]
    return [file for file in files if not file.relative_to(repository).as_posix().startswith(ours)]


def check(composed: DictConfig, choices: Mapping[str, str], to_run: bool = True) -> Settings:
    """The settings of one run, typed and possible.

    Args:
        composed: what Hydra composed.
        choices: group -> file that was chosen; names the arm where `arm` is null.
        to_run: whether what the run needs has to be installed.

    Raises:
        SettingError: an unknown key, a missing value or an impossible one; the message is one line.
    """
    _refuse_unknown_keys(composed, "")
    try:
        _refuse_credentials(OmegaConf.to_container(composed, resolve=True), "")
        settings: Settings = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise SettingError(explain(error)) from error
    _refuse_removed_groups(choices)
    _refuse_paths(choices)
    _refuse_overruled_controls(choices)
    settings.arm = settings.arm or choices["optimizer"]
    _take_budget(settings)
    refuse_impossible(settings)
    if to_run:
        refuse_uninstalled(settings)
    _spell_one_way(settings)
    return settings


def explain(error: Exception) -> str:
    """One line for an exception of OmegaConf or Hydra, with the setting's name and what it allows."""
    cause = next((e for e in _chain(error) if isinstance(e, OmegaConfBaseException) and e.full_key), None)
    if cause is None:
        return _explain_hydra(error)
    key, schema = str(cause.full_key), cause.object_type
    path, _, last = key.rpartition(".")
    first_line = str(cause).splitlines()[0]
    if key == "_dummy_":  # Hydra's, where a name in the list of defaults needs a group that is taken away
        return f"{first_line.split(chr(39))[1]}: no value is given; name one of its files, see --help"
    if "is not a ListConfig" in first_line:
        given = cause.value if cause.value is not None else "…"
        return f"{key} is {given}; allowed: a list, such as '[{given}]'"
    if key in UNIONS and "type hint" in first_line:
        return f"{key} is {first_line.split(chr(39))[1]}; allowed: {UNIONS[key]}"
    if not ("not in" in first_line and first_line.startswith("Key")):
        return f"{key}: {first_line[0].lower()}{first_line[1:]}"
    allowed = [f.name for f in fields(schema)] if is_dataclass(schema) else list(cause.parent_node or ())
    if schema is Settings and "/" in last:
        return f"{last}: there is no such group here; the groups are those of conf/, such as optimizer/density"
    return _no_such(key, path, last, allowed)


def _refuse_credentials(value: Any, name: str) -> None:
    """A setting stands in the record, and may name its directory."""
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            _refuse_credentials(part, f"{name}.{key}".lstrip("."))
    elif isinstance(value, str):
        refuse_credential(value, name)


def refuse_credential(text: str, name: str) -> None:
    """Raise a SettingError where a text that would be recorded under a name holds somebody's key."""
    for variable, secret in secrets.named().items():
        if secret in text:
            raise SettingError(
                f"{name} holds the value of {variable} in the environment, and every setting stands in the record; "
                "allowed: settings without keys. What needs one reads the variable itself"
            )


def _refuse_removed_groups(choices: Mapping[str, str | None]) -> None:
    """Without their files these have defaults of the schema's, which nobody chose."""
    for group in ("trainer", "eval"):
        if choices.get(group) is None:
            raise SettingError(f"{group}: no value is given, since ~{group} takes it away; leave that out")


def _refuse_paths(choices: Mapping[str, str | None]) -> None:
    """Hydra takes a path to a file of a group, but a run's directory has its name and must not lie elsewhere."""
    for group in ("task", "data", "model", "optimizer"):
        if not is_plain_name(given := str(choices.get(group))):
            raise SettingError(f"{group} is {given!r}; allowed: the name of a file of conf/{group}, not a path to it")


def _refuse_overruled_controls(choices: Mapping[str, str | None]) -> None:
    """A control that was chosen as a group has no effect where the optimizer's file for the task sets its own."""
    own = _REPOSITORY / "conf" / "optimizer" / "for" / f"{choices.get('optimizer/for@optimizer')}.yaml"
    if not own.exists():
        return
    optimizer = choices["optimizer"]
    listed = OmegaConf.load(_REPOSITORY / "conf" / "optimizer" / f"{optimizer}.yaml").defaults
    usual = {group: name for entry in listed if not isinstance(entry, str) for group, name in entry.items()}
    for group, instead in (
        ("density", "optimizer.rank={kind:cosine,start:8,end:2}"),
        ("interval", "optimizer.interval=50"),
    ):
        given = choices.get(f"optimizer/{group}")
        if given != usual.get(group):
            raise SettingError(
                f"optimizer/{group} is {given}, which optimizer={optimizer} overrules with its own for "
                f"task={choices['task']}; write a value instead, such as {instead}"
            )


def _no_such(key: str, path: str, last: str, allowed: Iterable[str]) -> str:
    if key == "optimizer.density.fit_gib":
        return f"{key}: the density is a number here, which has no settings; write optimizer.fit_gib=…"
    if key == "data.store":
        return f"{key} is gone: tokens are always kept under cache_root; data.store_limit_gib limits them"
    what = f"{path} has no {last!r}" if path else "there is no such setting"
    return f"{key}: {what}; {nearest(last, allowed)}"


def _chain(error: BaseException | None) -> Iterable[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _explain_hydra(error: Exception) -> str:
    if getattr(error, "missing_cfg_file", None) and getattr(error, "options", None) is not None:
        group, _, name = error.missing_cfg_file.rpartition("/")
        root, _, rest = error.missing_cfg_file.partition("/")
        if root in _PLACES:
            group, name = root, rest
            names = [file.relative_to(_REPOSITORY / root).with_suffix("").as_posix() for file in _choices(root)]
        else:
            names = error.options
        return f"{group}: there is no {name!r}; {nearest(name, names)}"
    if getattr(error, "override", None):
        detail = " ".join(error.message.split("\nSee ")[0].split())
        return f"{error.override!r} is not a setting: {detail}; write name=value (quote spaces, commas and brackets)"
    text = " ".join(str(error).split())
    if "No match in the defaults list" in text:
        return f"{text.split(' No match')[0]} It is no group, or none that goes with the other choices; see --help"
    if text.startswith("Config group override"):
        return f"{text}; a group takes the name of one of its files, such as optimizer=adamw; see --help"
    return text


def _refuse_unknown_keys(node: DictConfig, path: str) -> None:
    schema = OmegaConf.get_type(node)
    if not is_dataclass(schema):
        return
    allowed = [f.name for f in fields(schema)]
    for name in allowed:
        if name not in node and not OmegaConf.is_missing(node, name):
            raise SettingError(f"{path}{name}: no value is given, since ~{path}{name} takes it away; leave that out")
    for key in node:
        if key not in allowed:
            raise SettingError(_no_such(f"{path}{key}", path.rstrip("."), str(key), allowed))
        if OmegaConf.is_missing(node, key):
            raise SettingError(f"{path}{key}: no value is given")
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none():
            _refuse_unknown_keys(child, f"{path}{key}.")
        elif any(f.name == key and f.type == "Any" and path == "" for f in fields(schema)):
            raise SettingError(f"{key} is {node[key]!r}; name a file of conf/{key}, such as those in `--help`")


def _take_budget(s: Settings) -> None:
    """`optimizer.density.fit_gib` is another way to write `optimizer.fit_gib`; a control knows nothing of memory."""
    density = getattr(s.optimizer, "density", None)
    if isinstance(density, dict) and (given := density.pop("fit_gib", None)) is not None:
        if s.optimizer.fit_gib not in (None, given):
            twice = f"optimizer.fit_gib is {s.optimizer.fit_gib} and optimizer.density.fit_gib is {given}"
            raise SettingError(f"{twice}, which are two names of one setting; give one of them")
        s.optimizer.fit_gib = given


def _spell_one_way(s: Settings) -> None:
    """Give settings that mean the same the same form, so that one run has one identity.

    A plain number means constant, 1 is 1.0 where a share is meant, a subspace with its defaults is its name, and what
    is spelt out although null means it becomes null.
    """
    steps = run_steps(s)
    if s.task.kind == "pretrain":
        tokenizer = s.data.tokenizer
        given, tokenizer.vocabulary_size = tokenizer.vocabulary_size, None
        if tokenizer.kind == "train" and given != trained_size(s):
            tokenizer.vocabulary_size = given
    if s.schedule.warmup == (getattr(s.schedule, "cycle", None) or steps) // 10:
        s.schedule.warmup = None
    if getattr(s.schedule, "cycle", None) == steps:
        s.schedule.cycle = None
    if s.optimizer.kind != "frugal":
        return
    o = s.optimizer
    o.state_dtype = None if o.state_dtype == "float32" else o.state_dtype
    for name in ("density", "rank"):
        if getattr(o, name) is not None:
            setattr(o, name, _control(getattr(o, name), steps, controls.DENSITIES, shares=True))
    o.interval = _control(o.interval, steps, controls.INTERVALS, shares=False, epochs=s.task.kind == "finetune")
    if isinstance(o.subspace, dict):
        kind = o.subspace["kind"]
        different = {key: v for key, v in o.subspace.items() if key != "kind" and v != SUBSPACES[kind][key][0]}
        o.subspace = {"kind": kind} | different if different else kind


def _control(
    given: Any, steps: int, kinds: Mapping[str, type[controls.Control]], shares: bool, epochs: bool = False
) -> dict[str, Any]:
    control = dict(given) if isinstance(given, dict) else {"kind": "constant", "value": given}
    kind = control["kind"]
    for key, filled in with_run_length({"kind": kind}, steps).items():
        in_epochs = key == "every" and epochs  # where null is another number
        if key != "kind" and not in_epochs and control.get(key) == filled:
            control[key] = None
    real = {f.name for f in fields(kinds[kind]) if f.type == "float"} if shares or kind != "constant" else set()
    return {key: float(value) if key in real else value for key, value in control.items()}
