import json

import pytest

from adafrugal.data.text.documents import INVALID, Rules, select

LINES = Rules(json_lines=True, text_field="text")
TEXT = Rules(json_lines=False, text_field="text")


def line(text):
    return json.dumps({"text": text, "url": "x"})


def test_the_text_of_each_line_is_a_document():
    found = select([line("one"), line("hai, ba"), line(" three\n")], LINES)
    assert found.texts == ["one", "hai, ba", " three\n"]
    assert not found.skipped


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
    found = select([line("before"), broken, line("after")], LINES)
    assert found.texts == ["before", "after"]
    assert found.skipped == {reason: 1}


def test_the_fields_of_a_line_without_the_text_are_kept_for_the_message():
    assert select(['{"content": "x", "id": 1}'], LINES).fields == ["content", "id"]


def test_rows_may_be_missing_or_undecodable():
    found = select(["one", None, b"\xff", f"x{INVALID}", "two"], TEXT)
    assert found.texts == ["one", "two"]
    assert found.skipped == {"no text": 1, "not UTF-8": 2}


def test_what_is_held_out_and_the_rest_are_all_documents_once():
    texts = [f"document {i}" for i in range(2000)]
    parts = [select(texts, Rules(False, "text", keep, held_out=0.1)).texts for keep in ("held_out", "rest")]
    assert sorted(parts[0] + parts[1]) == sorted(texts)
    assert 150 < len(parts[0]) < 250
    more = select(texts, Rules(False, "text", "held_out", held_out=0.2)).texts
    assert set(parts[0]) < set(more), "a larger share holds out the same documents and others"


def test_nfc_composes_diacritics_and_keeps_them():
    apart = "Tie\u0302\u0301ng Vie\u0323\u0302t"
    (text,) = select([apart], Rules(False, "text", normalization="nfc")).texts
    assert text == "Tiếng Việt" and len(text) == 10
    assert select([apart], TEXT).texts == [apart]
    assert select(["½ﬁ"], Rules(False, "text", normalization="nfkc")).texts == ["1⁄2fi"]
