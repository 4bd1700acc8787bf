"""List the choices for `--help`, and explain exceptions of Hydra and OmegaConf in one line each."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterable
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from adafrugal.settings import REPOSITORY
from adafrugal.system.errors import chain, line

_LONG, _FEW = 300, 6  # characters of a list of allowed names that is shortened, and to how many names
_ALIKE = 0.6  # from here on a name may be meant
_PLACES = ("experiments", "sweeps")  # beside conf/; their groups are nested
_TYPES = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
# OmegaConf's words for a value of a wrong type
_WRONG_TYPE = re.compile(
    r"Value '(?P<value>.*)' of type '(?P<type>\w+)' (?:could not be converted|is incompatible)"
    r"|Value '(?P<truth>.*)' is not a valid bool \(type (?P<kind>\w+)"
    r"|Cannot convert '\w+' to string: '(?P<text>.*)'"
    r"|[Ff]ield '.*' is not (?P<null>Optional)|(?P<map>Cannot merge DictConfig)",
)
_NO_EXPERIMENTS = tuple(f"experiments/{name}" for name in ("published", "results", "tables"))


def groups(repository: Path = REPOSITORY) -> str:
    """Return the groups and the files to choose from, one group a line."""
    found: dict[str, list[str]] = {}
    for root, place in (("conf", "conf"), *((".", place) for place in _PLACES)):
        for file in _choices(place, repository):
            group = file.parent.relative_to(repository / root).as_posix()
            if group != "." and not group.startswith(("optimizer/for", "optimizer/at")):  # other choices select these
                found.setdefault(group, []).append(file.stem)
    return "\n".join(f"  {group}: {', '.join(names)}" for group, names in found.items())


def _choices(place: str, repository: Path = REPOSITORY) -> list[Path]:
    """Return the settings files of a directory that can be chosen by name; other files include _*.yaml."""
    files = [file for file in sorted((repository / place).rglob("*.yaml")) if not file.stem.startswith("_")]
    return [file for file in files if not file.relative_to(repository).as_posix().startswith(_NO_EXPERIMENTS)]


def nearest(name: str, allowed: Iterable[str], rest: str = "") -> str:
    """Return the end of a message: the allowed name nearest to the given one, and all allowed names.

    Of a list that is too long to read it has the nearest few, and `rest`, which says where the others are.
    """
    allowed = [a for a in allowed if not a.startswith("schema_")]
    ranked = sorted(allowed, key=lambda other: _likeness(name, other), reverse=True)
    guess = f"did you mean {ranked[0]}? " if ranked and _likeness(name, ranked[0])[0] >= _ALIKE else ""
    if len(listed := ", ".join(allowed)) > _LONG:
        listed = f"{', '.join(ranked[:_FEW])} and {len(allowed) - _FEW} others{f' ({rest})' if rest else ''}"
    return f"{guess}allowed: {listed or 'nothing'}"


def _likeness(name: str, other: str) -> tuple[float, int]:
    """Return how much alike two names are, from 0 to 1, and how many characters they begin with in common.

    The end of a path or its beginning is nearly the whole; a longer name that has it as a word comes after these.
    """
    name, last, other = name.lower(), re.split(r"[./]", other.lower())[-1], other.lower()
    part = 0.9 if name and last.startswith(name) else 0.7 if last in re.split(r"[._/ ]", name) else 0.0
    common = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(name, other, strict=False))
    return max(difflib.SequenceMatcher(None, name, other).ratio(), part), sum(1 for _ in common)


def no_such(key: str, allowed: Iterable[str]) -> str:
    """Return the message for a setting that does not exist, with the names that do."""
    path, _, last = key.rpartition(".")
    if key in ("optimizer.density.fit_gib", "optimizer.density.fit_card_gib"):
        return f"{key}: the density is a number here, which has no settings; write optimizer.{last}=…"
    if key == "data.store":
        return f"{key} is gone: tokens are always kept under cache_root; data.store_limit_gib limits them"
    what = f"{path} has no {last!r}{_elsewhere(path, last)}" if path else "there is no such setting"
    return f"{key}: {what}; {nearest(last, allowed, 'python train.py --cfg job shows them')}"


def _elsewhere(group: str, name: str) -> str:
    """Return which other files of a group have a setting."""
    from adafrugal.settings.schema import SCHEMAS

    kinds = [schema.kind for schema in SCHEMAS.get(group, ()) if name in (f.name for f in fields(schema))]
    files = sorted((REPOSITORY / "conf" / group).glob("*.yaml")) if kinds else []
    having = [file.stem for file in files if any(re.search(rf"schema_{kind}\b", file.read_text()) for kind in kinds)]
    having.sort(key=lambda file: file not in kinds)  # what several files extend comes first
    named = [f"{group}={file}" for file in having[:2]] + ["others"] * (len(having) > 2)
    return f", which is a setting of {' and '.join(named)}" if named else ""


def explain(error: Exception) -> str:
    """Return one line for an exception of OmegaConf or Hydra, with the setting's name and its allowed values."""
    cause = next((e for e in chain(error) if isinstance(e, OmegaConfBaseException) and e.full_key), None)
    if cause is None:
        return _explain_hydra(error)
    key, first_line = str(cause.full_key), str(cause).splitlines()[0]
    last = key.rpartition(".")[2]
    known = {f.name: f for f in fields(cause.object_type)} if is_dataclass(cause.object_type) else {}
    if key == "_dummy_":  # from Hydra, if a name in the list of defaults needs a removed group
        return f"{first_line.split(chr(39))[1]}: no value is given; name one of its files, see --help"
    if "is not a ListConfig" in first_line:
        given = cause.value if cause.value is not None else "…"
        return f"{key} is {given}; allowed: a list, such as '[{given}]'"
    if (wrong := _WRONG_TYPE.match(first_line)) and (taken := _field(cause, last)) is not None:
        return f"{key} is {_given(wrong)}; allowed: {_allowed(taken)}"
    if first_line.startswith("Invalid type assigned"):
        return f"{key} is {first_line.rpartition(' ')[2]}; allowed: its settings, each by its name: {key}.…=…"
    if not ("not in" in first_line and first_line.startswith("Key")):
        return f"{key}: {first_line[0].lower()}{first_line[1:]}"
    if key == last and "/" in last:
        return f"{last}: there is no such group here; the groups are those of conf/, such as optimizer/density"
    return no_such(key, known or list(cause.parent_node or ()))


def _field(cause: OmegaConfBaseException, name: str) -> Field[Any] | None:
    """Return the field of a dataclass that an error is about, also by an element of its list."""
    parent = cause.parent_node
    parent = parent._get_parent() if isinstance(parent, ListConfig) else parent
    schema = None if parent is None else OmegaConf.get_type(parent)
    known = {f.name: f for f in fields(schema)} if is_dataclass(schema) else {}
    return known.get(name.partition("[")[0])


def _given(wrong: re.Match[str]) -> str:
    """Return a value of a wrong type as it was typed, in quotes if it is text."""
    if wrong["null"] or wrong["map"]:
        return "null" if wrong["null"] else "a mapping"
    kind = wrong["type"] or wrong["kind"]
    value = next(wrong[name] for name in ("value", "truth", "text") if wrong[name] is not None)
    return f"'{value}'" if kind == "str" else value.lower() if kind == "bool" else value


def _allowed(taken: Field[Any]) -> str:
    """Return what a field takes, in words: its type, its range, and null."""
    types, within = str(taken.type).split(" | "), taken.metadata.get("allowed", "")
    kinds = [_TYPES.get(kind, "a list" if kind.startswith("list") else "") for kind in types if kind != "None"]
    words = "a number" if kinds == ["a whole number", "a number"] else " or ".join(filter(None, kinds))
    if isinstance(within, tuple):
        words = ", ".join(within)
    elif within:
        words = f"{words}, {within}" if within[0].isdigit() or within.startswith("above") else within
    return f"{words}, or null" if "None" in types and "null" not in words else words


def _explain_hydra(error: Exception) -> str:
    if getattr(error, "missing_cfg_file", None) and getattr(error, "options", None) is not None:
        group, _, name = error.missing_cfg_file.rpartition("/")
        root, _, rest = error.missing_cfg_file.partition("/")
        names = error.options
        if root in _PLACES:
            group, name = root, rest
            names = [file.relative_to(REPOSITORY / root).with_suffix("").as_posix() for file in _choices(root)]
        return f"{group}: there is no {name!r}; {nearest(name, names, '--help lists them')}"
    if getattr(error, "override", None):
        detail = " ".join(error.message.split("\nSee ")[0].split())
        return f"{error.override!r} is not a setting: {detail}; write name=value (quote spaces, commas and brackets)"
    text = line(error)
    if "No match in the defaults list" in text:
        return f"{text.split(' No match')[0]} It is no group, or none that goes with the other choices; see --help"
    if several := re.match(r"(?:Ambiguous value for argument|Sweep parameters) '(.*?)' (?:1\.|requires)", text):
        name, _, values = several[1].partition("=")
        is_list = text.startswith("Amb") and not (REPOSITORY / "conf" / name).is_dir()
        other = f", or a list: '{name}=[{values}]'" if is_list else ""
        return f"{several[1]} has several values, each for a run of its own; allowed: one, or a sweep: add -m{other}"
    if text.startswith("Config group override"):
        return f"{text}; a group takes the name of one of its files, such as optimizer=adamw; see --help"
    return text
