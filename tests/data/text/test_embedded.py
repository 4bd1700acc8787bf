import pytest

from adafrugal.data.text import embedded


@pytest.fixture(scope="module")
def corpus():
    return embedded.read()


def test_the_text_is_the_same_on_every_machine_with_the_pinned_packages(corpus):
    if embedded.versions() != {"torch": "2.13.0", "numpy": "2.4.6"}:
        pytest.skip("other versions than requirements.txt pins")
    assert corpus.fingerprint == "28c1f2085f44ec87348e8d09492b51a476bd9bb51a15bf322fa14173be62380a"


def test_there_are_megabytes_of_it_and_a_twentieth_is_held_out(corpus):
    train, held_out = (sum(map(len, part)) for part in (corpus.train, corpus.validation))
    assert train > 4_000_000
    assert 0.03 < held_out / (train + held_out) < 0.08


def test_no_document_of_one_part_stands_in_the_other(corpus):
    assert not set(corpus.train) & set(corpus.validation)
    assert len(set(corpus.train)) == len(corpus.train)


def test_it_is_prose_with_white_space_folded(corpus):
    assert all(d == " ".join(d.split()) and len(d) >= embedded.SHORTEST for d in corpus.train)
    text = " ".join(corpus.train)
    for word in ("the", "returns", "tensor", "array"):
        assert text.lower().count(f" {word} ") > 100


def test_docstrings_and_added_docs_are_found_in_order_and_comments_are_not(tmp_path):
    long = [f"{word} " * 120 for word in "abcdef"]
    file = tmp_path / "module.py"
    file.write_text(
        f'"""{long[0]}"""\n# {long[5]}\nclass A:\n    """{long[1]}"""\n    def f(self):\n        """short"""\n'
        f'add_docstr(f, r"""{long[2]}""")\nadd("f", """{long[3]}""".format(x=1))\nx = """{long[4]}"""\n'
    )
    assert [text.split()[0] for text in embedded._docstrings(str(file))] == ["a", "b", "c", "d"]


def test_a_file_that_is_no_python_is_left_out(tmp_path):
    file = tmp_path / "module.py"
    file.write_text("def (")
    assert embedded._docstrings(str(file)) == []


def test_a_paragraph_that_stood_before_is_dropped_wherever_it_stands():
    template = "A template paragraph that is repeated. " * 6
    first, second = "First words. " * 30, "Second words. " * 30
    kept = list(embedded._unrepeated(iter([f"{first}\n\n{template}", f"{template}\n\n{second}", template])))
    assert [d.count("template") for d in kept] == [6, 0]
    assert kept[1].startswith("Second")
