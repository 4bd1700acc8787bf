"""What all tests share: one cache of prepared text for the session, and the settings of a tiny run."""

import atexit
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

if "OMP_WAIT_POLICY" not in os.environ:  # before torch is there; see adafrugal.system.threads
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:  # what one process of the tests compiles is there for all
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
    atexit.register(shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)

import hypothesis
import pytest
import torch
from filelock import FileLock

pytest_plugins = ["corpora", "labelled_sets", "forks", "torture", "runs"]  # shared by several directories of tests
