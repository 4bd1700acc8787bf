"""Encoders: what is read, what is new, and what is refused."""

import json
import shutil

import pytest
import torch
from labelled_sets import write_encoder
from safetensors.torch import load_file, save_file

from adafrugal.models import encoder
from adafrugal.settings.schema import EncoderSettings
from adafrugal.system.errors import SettingError


@pytest.fixture
def changed(tiny_encoder, tmp_path):
    """A function that changes the weights of a copy of the tiny encoder: what does it -> the copy."""
    place = shutil.copytree(tiny_encoder, tmp_path / "encoder")

    def change(by):
        weights = load_file(place / "model.safetensors")
        save_file(by(weights) or weights, place / "model.safetensors", metadata={"format": "pt"})
        return place

    return change


def load(place, outputs=2, seed=0):
    torch.manual_seed(seed)
    return encoder.load(EncoderSettings(name=str(place)), outputs)


@pytest.mark.parametrize(("kind", "longest"), [("bert", 66), ("roberta", 65), ("mpnet", 64)])
def test_pretrained_weights_are_read_and_the_longest_input_is_what_the_positions_allow(kind, longest, tmp_path):
    """RoBERTa and MPNet count after their padding index, here 0 and (MPNet's own) 1."""
    place = write_encoder(tmp_path, kind)
    model, tokenizer, _ = load(place, outputs=3)
    saved = load_file(place / "model.safetensors")
    read = {k: v for k, v in model.base_model.state_dict().items() if "pooler" not in k}
    assert read.keys() <= saved.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in read.items())
    assert model(**tokenizer(["the matrix"], return_tensors="pt")).logits.shape == (1, 3)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
    tokenizer.model_max_length = 10**30
    assert encoder.longest_input(model, tokenizer) == longest
    model(input_ids=torch.full((1, longest), 5), attention_mask=torch.ones(1, longest, dtype=torch.int64))
    with pytest.raises((IndexError, RuntimeError)):
        longer = torch.full((1, longest + 1), 5)
        model(input_ids=longer, attention_mask=torch.ones_like(longer))
    tokenizer.model_max_length = 50
    assert encoder.longest_input(model, tokenizer) == 50


def test_the_head_depends_on_the_seed(tiny_encoder):
    heads = [load(tiny_encoder, seed=seed)[0].classifier.weight for seed in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_half_precision_weights_become_float32(changed):
    place = changed(lambda weights: {k: v.bfloat16() for k, v in weights.items()})
    config = json.loads((place / "config.json").read_text()) | {"dtype": "bfloat16"}
    (place / "config.json").write_text(json.dumps(config))
    assert {p.dtype for p in load(place)[0].parameters()} == {torch.float32}


@pytest.mark.parametrize(("name", "by"), [
    ("encoder.layer.1.attention.self.query.weight", lambda weights, name: weights.pop(name) is None),
    ("encoder.layer.0.output.dense.bias", lambda weights, name: weights.update({name: torch.zeros(5)})),
])  # fmt: skip
def test_weights_that_lack_a_part_of_the_encoder_or_have_another_shape_are_refused(name, by, changed):
    place = changed(lambda weights: by(weights, name))
    with pytest.raises(SettingError, match=rf"lack 1 of .*, such as bert\.{name}"):
        load(place)


def test_the_fingerprint_is_of_the_pretrained_weights(tiny_encoder, changed):
    before = load(tiny_encoder)[2]
    assert load(tiny_encoder, outputs=5, seed=1)[2] == before
    place = changed(lambda weights: {k: v for k, v in weights.items() if "pooler" not in k})
    found = [load(place, seed=seed) for seed in (0, 1)]  # a new pooler is no part of it
    assert found[0][2] == found[1][2] != before
    assert not torch.equal(*(model.base_model.pooler.dense.weight for model, _, _ in found))
    place = changed(lambda weights: weights["embeddings.word_embeddings.weight"][3, 3].add_(1) is None)
    assert load(place)[2] != found[0][2]
