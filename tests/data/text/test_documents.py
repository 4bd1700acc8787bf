import json

import pytest

from adafrugal.data.text.documents import INVALID, Rules, select

LINES = Rules(json_lines=True, text_field="text")
TEXT = Rules(json_lines=False, text_field="text")


def line(text):
    return json.dumps({"text": text, "url": "x"})


@pytest.mark.parametrize(
    "broken, reason",
    [
        ('{"text": "cut of', "not JSON"),
        (line(f"bytes {INVALID}"), "not UTF-8"),
        (f'{{"text": "{INVALID}"}}', "not UTF-8"),
        (r'{"text": "half a pair \ud83d"}', "not UTF-8"),
        ('{"txt": "x"}', "no field 'text'"),
        ("[1, 2]", "no object"),
        ("[" * 100_000, "not JSON"),
        ('{"text": null}', "no text"),
        ('{"text": 3}', "no text"),
        (line("  \n"), "empty"),
        ("", "empty"),
    ],
)
def test_a_broken_line_costs_only_itself_and_is_counted_with_its_reason(broken, reason):
    texts, counts = select([line("hai, ba"), broken, line(" after\n")], LINES)
    assert texts == ["hai, ba", " after\n"]
    assert counts.skipped == {reason: 1} and counts.sound == 2
    assert counts.fields == (["txt"] if "txt" in broken else []), "for the message"


def test_rows_may_be_missing_or_undecodable():
    texts, counts = select(["one", None, b"\xff", f"x{INVALID}", "two"], TEXT)
    assert texts == ["one", "two"] and counts.skipped == {"no text": 1, "not UTF-8": 2}


def test_each_document_is_held_out_or_not():
    texts = [f"document {i}" for i in range(2000)]
    held_out, rest = (select(texts, Rules(False, "text", keep, held_out=0.1))[0] for keep in ("held_out", "rest"))
    assert sorted(held_out + rest) == sorted(texts) and 150 < len(held_out) < 250
    more, _ = select(texts, Rules(False, "text", "held_out", held_out=0.2))
    assert set(held_out) < set(more), "a larger share holds out the same documents and others"


def test_nfc_composes_diacritics_and_keeps_them():
    apart = "Tie\u0302\u0301ng Vie\u0323\u0302t"
    for form, text, expected in (("nfc", apart, "Tiếng Việt"), ("none", apart, apart), ("nfkc", "½ﬁ", "1⁄2fi")):
        assert select([text], Rules(False, "text", normalization=form))[0] == [expected]
