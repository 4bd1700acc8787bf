"""How threads wait is set before torch is there, and left to who has set it."""

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
    code = (
        "import os, sys\nfrom adafrugal import threads\nthreads.wait_asleep()\nassert 'torch' not in sys.modules\n"
        "print({name: os.environ[name] for name in ('GOMP_SPINCOUNT', 'OMP_WAIT_POLICY') if name in os.environ})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=given)
    assert done.stdout.strip() == str(expected), done.stderr
