import io
import sys

from adafrugal.system.stderr import tell


def test_a_key_is_hidden(capsys, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "sesame-open")
    tell("error: the server refuses sesame-open")
    assert capsys.readouterr().err == "error: the server refuses ***\n"


def test_nobody_needs_to_read_it(monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Closed())
    tell("error: unheard")
