"""The options of commands: what is wrong is one line that says what is allowed, and exit code 2."""

import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY

from adafrugal.settings.command_line import Parser
from adafrugal.system.errors import SettingError


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("here --pag x", "there is no option --pag; did you mean --page? allowed: --help, --pages, --page, --trials"),
        ("here --seed=3", "there is no option --seed; allowed: --help"),
        ("--page", "--page: no value is given; allowed: tables [-h] "),
        ("--trials x", "--trials is 'x'; allowed: a whole number"),
        ("", "place: not given; allowed: tables [-h] "),
        ("here there", "there is more than the command takes; allowed: tables [-h] "),
    ],
)
def test_a_wrong_option_is_a_line(words, says):
    parser = Parser(prog="tables")
    parser.add_argument("place")
    for option, kind in (("--pages", str), ("--page", str), ("--trials", int)):
        parser.add_argument(option, type=kind)
    with pytest.raises(SettingError) as caught:
        parser.parse_args(words.split())
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("reports --pag x", "there is no option --pag; did you mean --page?"),
        ("memory --seed=3", "there is no option --seed; did you mean seed=3? Settings are written without dashes"),
        ("launching.search --lr 3", "there is no option --lr; did you mean optimizer.lr=…?"),
        ("training", "checkpoint, directory: not given"),
        ("data --al", "there is no option --al; did you mean --all?"),
    ],
)
def test_every_command_says_so(command, says):
    words = [sys.executable, "-m", *f"adafrugal.{command}".split()]
    done = subprocess.run(words, capture_output=True, text=True, cwd=REPOSITORY, env=os.environ)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith(f"error: {says}")
