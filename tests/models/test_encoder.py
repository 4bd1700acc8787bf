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
def copy(tiny_encoder, tmp_path):
    """A copy of the tiny encoder that a test may break."""
    return shutil.copytree(tiny_encoder, tmp_path / "encoder")


def load(place, outputs=2):
    return encoder.load(EncoderSettings(name=str(place)), outputs)


@pytest.mark.parametrize("kind", ["bert", "roberta", "mpnet"])
def test_the_pretrained_weights_are_read_and_the_head_is_new(kind, tmp_path):
    place = write_encoder(tmp_path, kind)
    torch.manual_seed(0)
    model, tokenizer, _ = load(place, outputs=3)
    saved = load_file(place / "model.safetensors")
    read = {k: v for k, v in model.base_model.state_dict().items() if "pooler" not in k}
    assert read.keys() <= saved.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in read.items())
    assert model(**tokenizer(["the matrix"], return_tensors="pt")).logits.shape == (1, 3)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())


def test_the_head_is_the_seeds(tiny_encoder):
    heads = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        heads.append(load(tiny_encoder)[0].classifier.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_half_precision_weights_become_float32(copy):
    file = copy / "model.safetensors"
    save_file({k: v.bfloat16() for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    config = json.loads((copy / "config.json").read_text()) | {"dtype": "bfloat16"}
    (copy / "config.json").write_text(json.dumps(config))
    assert {p.dtype for p in load(copy)[0].parameters()} == {torch.float32}


def test_weights_that_lack_a_part_of_the_encoder_are_refused(copy):
    file = copy / "model.safetensors"
    weights = load_file(file)
    del weights["encoder.layer.1.attention.self.query.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(SettingError, match=r"lack 1 of .*, such as bert\.encoder\.layer\.1\.attention"):
        load(copy)


def test_weights_of_another_shape_are_refused(copy):
    file = copy / "model.safetensors"
    weights = load_file(file)
    weights["encoder.layer.0.output.dense.bias"] = torch.zeros(5)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(SettingError, match=r"lack 1 .*bert\.encoder\.layer\.0\.output\.dense\.bias"):
        load(copy)


def test_the_fingerprint_is_of_the_pretrained_weights(copy):
    torch.manual_seed(0)
    before = load(copy)[2]
    torch.manual_seed(1)
    assert load(copy, outputs=5)[2] == before
    weights = load_file(copy / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][3, 3] += 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert load(copy)[2] != before


def test_a_pooler_that_is_new_is_no_part_of_the_fingerprint(copy):
    weights = {k: v for k, v in load_file(copy / "model.safetensors").items() if "pooler" not in k}
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model, _, fingerprint = load(copy)
        found.append((fingerprint, model.base_model.pooler.dense.weight))
    assert found[0][0] == found[1][0]
    assert not torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize(("kind", "longest"), [("bert", 66), ("roberta", 65), ("mpnet", 64)])
def test_the_longest_input_is_what_the_positions_allow(kind, longest, tmp_path):
    """RoBERTa and MPNet begin to count after their padding index, here 0 and (MPNet's own) 1."""
    model, tokenizer, _ = load(write_encoder(tmp_path, kind))
    tokenizer.model_max_length = 10**30
    assert encoder.longest_input(model, tokenizer) == longest
    tokens = torch.full((1, longest), 5)
    model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    with pytest.raises((IndexError, RuntimeError)):
        longer = torch.full((1, longest + 1), 5)
        model(input_ids=longer, attention_mask=torch.ones_like(longer))
    tokenizer.model_max_length = 50
    assert encoder.longest_input(model, tokenizer) == 50
