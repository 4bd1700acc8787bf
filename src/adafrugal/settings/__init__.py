"""Compose and check settings: schema, ranges, composition, identity. Imports no torch."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]  # with conf/, experiments/ and sweeps/
