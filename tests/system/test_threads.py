"""How threads wait is set before torch is there, and left to who has set it."""

import os
import subprocess
import sys

import pytest

from adafrugal.system import threads


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"GOMP_SPINCOUNT": threads.SPINS}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
    ],
)
def test_what_the_environment_says_counts(given, expected):
    code = """if True:
        import os, sys
        from adafrugal.system import threads
        threads.wait_asleep()
        assert "torch" not in sys.modules
        print({name: os.environ[name] for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY") if name in os.environ})"""
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), **given}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == str(expected), done.stderr
