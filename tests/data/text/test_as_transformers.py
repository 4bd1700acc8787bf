"""The tokenizer of a checkpoint: `AutoTokenizer` reads it, and it gives the ids that the run trains on."""

import io
import json
import random
import unicodedata

import pytest
import sentencepiece
import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from adafrugal.data.text import as_transformers, embedded, tokenizer
from adafrugal.data.text.tokenizer import PretrainedTokenizer, SentencePieceTokenizer


@pytest.fixture(scope="module")
def texts(cache_root):
    """The embedded text's held-out documents, awkward strings, and random ones of few and of many characters."""
    directory, _ = embedded.export(cache_root, str)
    held_out = [json.loads(line)["text"] for line in (directory / "embedded-validation.jsonl").open()]
    chosen = random.Random(0)
    letters = "".join(sorted(set("".join(held_out)))) + "漢😀\u0301\0\t\n é"
    drawn = ["".join(chosen.choices(letters, k=chosen.randint(1, 60))) for _ in range(2000)]
    drawn += ["".join(chosen.choices("inste \n", k=chosen.randint(1, 40))) for _ in range(1000)]
    assert sum(map(len, held_out)) > 200_000
    return [*as_transformers.AWKWARD, *held_out, *drawn]


@pytest.fixture(scope="module")
def sentences(cache_root):
    directory, _ = embedded.export(cache_root, str)
    return [json.loads(line)["text"] for line in (directory / "embedded-train.jsonl").open()][::20]


def of_model(sentences, **more):
    """A .model file that somebody else trained."""
    how = {"vocab_size": 600, "model_type": "bpe", "minloglevel": 2, "num_threads": 1, **more}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=(made := io.BytesIO()), **how
    )
    return SentencePieceTokenizer(made.getvalue())


def of_hub(directory):
    """A tokenizer like T5's: unigram, with special pieces and sentinels, which are ordinary text to a run."""
    specials, sentinels = ["<pad>", "</s>", "<unk>"], [f"<extra_id_{i}>" for i in range(3)]
    letters = sorted({*"▁abcdefghijklmnopqrstuvwxyz/>_0123456789"})  # no "<", as T5 has none
    pieces = (
        [(s, 0.0) for s in specials] + [(c, -5.0) for c in letters] + [("▁the", -2.0), *((s, 0.0) for s in sentinels)]
    )
    made = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.decoder = tokenizers.decoders.Metaspace()
    made.add_special_tokens([*specials, *sentinels])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "extra_special_tokens": sentinels}
    PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(directory)
    return PretrainedTokenizer.of_transformers(str(directory))


MAKERS = {
    "bpe": lambda texts, _: tokenizer.train(texts, 800, "bpe"),
    "bpe, unknown characters": lambda texts, _: tokenizer.train(texts, 800, "bpe", byte_fallback=False),
    "unigram": lambda texts, _: tokenizer.train(texts, 800, "unigram"),
    "like LLaMA's": lambda texts, _: of_model(
        texts, byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False
    ),
    "SentencePiece's defaults": lambda texts, _: of_model(texts),
    "symbols of a user's": lambda texts, _: of_model(
        texts, user_defined_symbols=["<tool>"], normalization_rule_name="identity", add_dummy_prefix=False,
        remove_extra_whitespaces=False,
    ),
    "like T5's": lambda _, directory: of_hub(directory),
}  # fmt: skip


def loaded(made, directory, normalization="none"):
    """The tokenizer as a checkpoint's reader has it, and a text that differs."""
    directory.mkdir(exist_ok=True)
    files, differs = as_transformers.export(made, normalization)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return AutoTokenizer.from_pretrained(directory), differs


@pytest.mark.parametrize("kind", MAKERS)
def test_it_gives_the_ids_of_the_run(kind, texts, sentences, tmp_path):
    made = MAKERS[kind](sentences, tmp_path / "hub")
    found, differs = loaded(made, tmp_path / "checkpoint")
    assert differs is None
    more = ["the <extra_id_1> and </s> and <pad>", "a <tool> b", *(f"{made.decode([i])} x" for i in range(made.size))]
    for text, ids in zip([*texts, *more], found([*texts, *more])["input_ids"], strict=True):
        assert ids == made.encode([text])[0][:-1].tolist(), text
    assert (found.eos_token_id, found.pad_token_id, len(found)) == (made.end, made.pad, made.size)
    assert found("a")["attention_mask"] == [1] * len(found("a")["input_ids"]) and len(found("a")) == 2
    text = "the gradient keeps two moments"
    assert found.decode(found.encode(text)) == text == found.decode([*found.encode(text), made.end], True)


def test_it_normalizes_as_the_run_does(sentences, tmp_path):
    made = tokenizer.train(sentences, 800, "bpe")
    for form in ("nfc", "nfkc"):
        found, differs = loaded(made, tmp_path / form, form)
        assert differs is None
        for text in (*as_transformers.AWKWARD, "Tie\u0302\u0301ng Vie\u0323\u0302t ﬁ"):
            ids = made.encode([unicodedata.normalize(form.upper(), text)])[0][:-1].tolist()
            assert found.encode(text) == ids, (form, text)


def test_one_that_cannot_be_the_same_is_told(sentences):
    """Spaces beside a symbol, where the model drops them; and two ways to cut a word with the same score."""
    dropping = of_model(sentences, user_defined_symbols=["  "])
    assert as_transformers.export(dropping).differs == "  a  b  "


def test_more_chat_templates_which_are_a_directory_are_left_out(tmp_path):
    of_hub(tmp_path / "hub")
    found = AutoTokenizer.from_pretrained(tmp_path / "hub", chat_template={"default": "a", "tool": "b"})
    assert as_transformers.saved(found).keys() == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


def test_a_run_reads_the_tokenizer_of_a_checkpoint(sentences, tmp_path):
    """As the evaluation of other data does: the same ids again."""
    made = of_hub(tmp_path / "hub")
    loaded(made, tmp_path / "checkpoint")
    again = PretrainedTokenizer.of_transformers(str(tmp_path / "checkpoint"))
    assert (again.end, again.pad, again.size) == (made.end, made.pad, made.size)
    some = [*sentences[:50], *as_transformers.AWKWARD]
    assert [ids.tolist() for ids in again.encode(some)] == [ids.tolist() for ids in made.encode(some)]
