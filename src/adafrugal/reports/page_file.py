"""Read the file of a page of tables, and refuse unknown names in it before anything is composed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from adafrugal.reports import cells, claims, layouts, pictures
from adafrugal.reports.searches import SearchFile
from adafrugal.settings.explain import explain, nearest
from adafrugal.system.errors import SettingError

SECTIONS = "allowed: a list of tables, each with its keys: '- commands: […]'"
DOCS = "experiments/tables/README.md says which"


@dataclass
class SectionFile:
    """A table of a page, as its file describes it; a list of names may also be one name."""

    name: str = "table"  # in file names
    title: str = ""  # the page's by default
    commands: list[str] = MISSING  # to make its runs, without `python train.py`; they decide its rows
    note: str = ""  # below the title
    kind: str = "comparison"  # the layout: comparison, search, scores, lengths, spreads or side_by_side
    arms: dict[str, str | None] = field(default_factory=dict)  # rows to show, in this order -> names; {}: all
    columns: list[str] = field(default_factory=lambda: ["n", "loss", "difference", *cells.USUAL[1:]])
    reference: list[str] = field(default_factory=lambda: ["adamw"])  # rows to compare the others with
    best_of: list[str] = field(default_factory=list)  # swept settings: each arm is at its best values of them
    rates: dict[str, str] = field(default_factory=dict)  # {from: page/section}: the best rates of that section's arms
    search: SearchFile | None = None  # of each arm's rates; its rows are the arms at the best of them
    decisions: list[str] = field(default_factory=list)  # rows to test the others against, with a table for each
    text: str | None = None  # start of the data's fingerprint; null: the most common one of its runs
    published: list[str] = field(default_factory=list)  # columns of `experiments/published`, as file/column
    pictures: list[str] = field(default_factory=list)  # names of `pictures.DRAWN`
    claims: list[str] = field(default_factory=list)  # names of `claims.CLAIMS`


@dataclass
class PageFile:
    """A page of tables, as its file describes it."""

    place: int = 1000  # order among the pages
    title: str = ""  # the file's name by default
    about: str = ""  # paragraphs below the title
    commands: list[str] = field(default_factory=list)  # to make the papers' table
    sections: list[SectionFile] = MISSING


def read(path: Path) -> PageFile:
    """Return the page that a file describes.

    Raises:
        SettingError: an unreadable file, or an unknown key or name in it.
    """
    try:
        given = OmegaConf.to_container(OmegaConf.load(path))
        if given in ({}, None):
            raise SettingError(f"{path} is empty; write a page such as the one in experiments/tables/README.md")
        if not isinstance(given, dict):
            raise SettingError(f"{path} is a {type(given).__name__}; allowed: keys with values, such as sections: […]")
        sections = [_section(section, number, path) for number, section in enumerate(_plain(given, path)["sections"])]
        made = OmegaConf.merge(OmegaConf.structured(PageFile), given | {"sections": sections})
        file: PageFile = OmegaConf.to_object(made)
    except OSError as error:
        raise SettingError(f"{path}: {error.strerror}; name a file such as experiments/tables/density.yaml") from error
    except yaml.YAMLError as error:
        raise SettingError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    except MissingMandatoryValue as error:
        what = "is missing; write the words of train.py that make its runs, such as [seed=0]"
        raise SettingError(f"{path}: {error.full_key} {what}") from error
    except OmegaConfBaseException as error:
        raise SettingError(f"{path}: {explain(error)}") from error
    if not file.sections:
        raise SettingError(f"{path}: there are no sections; {SECTIONS}")
    file.title = file.title or path.stem
    for section in file.sections:
        section.title = section.title or file.title
        refuse_unknown(section, file, f"{path}, section {section.name}")
    return file


def _plain(given: dict[str, Any], path: Path) -> dict[str, Any]:
    """Write one name where a list of names is expected as a list, and a list of arms as rows that keep their names."""
    sections = given.setdefault("sections", [])
    if not (isinstance(sections, list) and all(isinstance(section, dict) for section in sections)):
        raise SettingError(f"{path}: sections is {sections!r}; {SECTIONS}")
    for section in sections:
        for key in ("reference", "best_of", "columns", "decisions", "pictures", "claims"):
            if key in section and not isinstance(section[key], list | dict):
                section[key] = [] if section[key] is None else [section[key]]
        if isinstance(section.get("arms"), list):
            section["arms"] = dict.fromkeys(section["arms"])
        if section.get("kind") == "side_by_side":
            section.setdefault("commands", [])
    return given


def _section(given: dict[str, Any], number: int, path: Path) -> DictConfig:
    """Check the keys of a section and the types of their values, with the section's name in an error."""
    try:
        return OmegaConf.merge(OmegaConf.structured(SectionFile), given)
    except OmegaConfBaseException as error:
        where = f"section {given['name']}" if "name" in given else f"sections[{number}]"
        raise SettingError(f"{path}, {where}: {explain(error)}") from error


def refuse_unknown(section: SectionFile, page: PageFile, where: str) -> None:
    """Refuse names that do not exist, and keys that the section's kind does not have.

    Raises:
        SettingError: such a name or key.
    """
    allowed: dict[str, Iterable[str]] = {
        "kind": layouts.KINDS, "pictures": pictures.DRAWN, "claims": claims.CLAIMS, "published": layouts.published(),
        "columns": layouts.columns(section, page.sections), "rates": ["from"],
    }  # fmt: skip
    for key, names in allowed.items():
        given = getattr(section, key)
        for name in [given] if isinstance(given, str) else given:
            refuse_other(name, names, f"{where}: {key}")
    usual = SectionFile()
    for key in ("arms", "columns", "best_of", "rates"):
        is_usual = getattr(section, key) == getattr(usual, key)
        if section.kind not in layouts.KINDS_WITH[key] and not is_usual:
            raise SettingError(f"{where}: {key} is of kind {' or '.join(layouts.KINDS_WITH[key])}, not {section.kind}")
    _refuse_both(section, where)


def _refuse_both(section: SectionFile, where: str) -> None:
    """Refuse keys that do not go together."""
    if section.decisions and section.kind == "scores":
        raise SettingError(f"{where}: decisions are of validation losses; kind scores has none, so leave them out")
    if section.best_of and section.decisions:
        why = "a decision takes seeds that did not choose the row"
        raise SettingError(f"{where}: best_of and decisions: {why}; take search, or rates, instead of best_of")
    chosen = [key for key in ("best_of", "rates", "search") if getattr(section, key)]
    if len(chosen) > 1:
        raise SettingError(f"{where}: {' and '.join(chosen)} choose the rows' settings; keep one of them")


def refuse_other(name: str, allowed: Iterable[str] | Mapping[str, Any], what: str) -> None:
    """Refuse a name that is not allowed, with the nearest one that is.

    Raises:
        SettingError: the name is not allowed.
    """
    if name not in allowed:
        raise SettingError(f"{what} has no {name!r}; {nearest(name, allowed, DOCS)}")
