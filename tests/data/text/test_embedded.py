import json

import pytest

from adafrugal.data.text import embedded


def test_the_text_is_prose_of_which_a_twentieth_is_held_out_and_the_same_on_every_machine(cache_root):
    directory, about = embedded.export(cache_root, str)
    assert about["packages"] == embedded.versions()
    if about["packages"] == {"torch": "2.13.0", "numpy": "2.4.6"}:  # as requirements.txt pins them
        assert about["text"] == "28c1f2085f44ec87348e8d09492b51a476bd9bb51a15bf322fa14173be62380a"
    train, held_out = (
        [json.loads(line)["text"] for line in (directory / f"embedded-{split}.jsonl").read_text().splitlines()]
        for split in ("train", "validation")
    )
    sizes = [sum(len(text.encode()) for text in split) for split in (train, held_out)]
    assert about["train_bytes"] == sizes[0] > 4_000_000 and 0.03 < sizes[1] / sum(sizes) < 0.08
    assert not set(train) & set(held_out) and len(set(train)) == len(train)
    assert all(d == " ".join(d.split()) and len(d) >= embedded.SHORTEST for d in train), "white space is folded"
    text = " ".join(train).lower()
    assert all(text.count(f" {word} ") > 100 for word in ("the", "returns", "tensor", "array"))


@pytest.mark.parametrize("broken", [False, True])
def test_docstrings_and_added_docs_are_found_in_order_and_comments_are_not(tmp_path, broken):
    long = [f"{word} " * 120 for word in "abcdef"]
    file = tmp_path / "module.py"
    file.write_text(
        f'"""{long[0]}"""\n# {long[5]}\nclass A:\n    """{long[1]}"""\n    def f(self):\n        """short"""\n'
        f'add_docstr(f, r"""{long[2]}""")\nadd("f", """{long[3]}""".format(x=1))\nx = """{long[4]}"""\n'
        + ("def (" if broken else "")
    )
    assert [text.split()[0] for text in embedded._docstrings(str(file))] == ([] if broken else ["a", "b", "c", "d"])


def test_a_paragraph_of_an_earlier_text_is_dropped():
    template = "A template paragraph that is repeated. " * 6
    first, second = "First words. " * 30, "Second words. " * 30
    kept = list(embedded._unrepeated(iter([f"{first}\n\n{template}", f"{template}\n\n{second}", template])))
    assert [d.count("template") for d in kept] == [6, 0]
    assert kept[1].startswith("Second")
