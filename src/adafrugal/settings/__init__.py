"""Compose and check settings: schema, ranges, composition, identity. Imports no torch."""

from importlib.util import find_spec
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]  # with conf/, experiments/ and sweeps/

if find_spec("omegaconf") is None:
    raise ModuleNotFoundError(
        "No module named 'omegaconf': this part of adafrugal needs the packages of `pip install 'adafrugal[train]'`; "
        "train.py and its settings are in the repository alone",
        name="omegaconf",
    )
