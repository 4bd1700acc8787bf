"""The task of fine-tuning: its loss, its evaluation, and what it says of a run."""

import math
import shutil

import pytest
import torch
from labelled_sets import VALIDATION, write_encoder
from safetensors.torch import load_file, save_file
from scipy.stats import pearsonr

from adafrugal.settings.identity import identify
from adafrugal.system.errors import SettingError, TrainingError
from adafrugal.tracking.record import Record
from adafrugal.training.devices import open_device
from adafrugal.training.session import run
from adafrugal.training.tasks.finetune import Finetune

pytestmark = pytest.mark.usefixtures("no_estimate")


@pytest.fixture
def task(finetune_settings):
    """A function that builds a task: name, overrides -> Finetune."""

    def make(name="rte", *overrides, state=None):
        chosen, _ = finetune_settings(name, *overrides)
        return Finetune(chosen, open_device(chosen.trainer), str, state)

    return make


@pytest.mark.parametrize("name", ["rte", "mnli", "stsb"])
def test_the_loss_is_transformers_own(name, task):
    built = task(name)
    built.model.eval()
    (batch,) = built.work(1).batches
    expected = built.model(
        input_ids=batch.tokens, attention_mask=batch.mask, token_type_ids=batch.types, labels=batch.labels
    ).loss
    assert built.loss(batch).item() / batch.count() == pytest.approx(expected.item(), rel=1e-6)


def test_micro_batches_make_the_same_gradients(task):
    found = []
    for size in ("null", "2", "1"):
        built = task("rte", f"trainer.micro_batch_size={size}")
        built.model.eval()  # dropout draws anew for each
        batches = built.work(1).batches
        assert len(batches) == {"null": 1, "2": 4, "1": 8}[size]
        for batch in batches:
            (built.loss(batch) / sum(b.count() for b in batches)).backward()
        found.append({name: p.grad for name, p in built.model.named_parameters()})
    for other in found[1:]:
        for name, gradient in found[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-6)


def test_the_examples_of_a_loss_that_is_no_number_are_named(finetune_settings, monkeypatch):
    """By their places in the training split, which a batch is not a range of."""
    loss, steps = Finetune.loss, iter(range(1, 100))
    spoilt = lambda self, given: loss(self, given) * (math.nan if self.model.training and next(steps) == 3 else 1)  # noqa: E731
    monkeypatch.setattr(Finetune, "loss", spoilt)
    chosen, choices = finetune_settings("rte", "optimizer=adamw", "trainer.epochs=1")
    with pytest.raises(TrainingError, match="the loss is nan at step 3"):
        run(chosen, choices)
    record = Record(identify(chosen, choices).directory)
    (event,) = [event for event in record.events() if event["event"] == "nonfinite"]
    built = Finetune(chosen, open_device(chosen.trainer), str)
    assert len(event["rows"]) == 8
    assert torch.equal(built._labelled.train.batch(event["rows"]).tokens, built.work(3).batches[0].tokens)


def test_the_head_and_the_order_of_examples_have_seeds_of_their_own(task):
    one, of_run, of_order = (task("rte", *words.split()) for words in ("", "seed=1 data.seed=0", "data.seed=1"))
    heads = [built.model.classifier.weight for built in (one, of_run, of_order)]
    assert torch.equal(heads[0], heads[2]) and not torch.equal(heads[0], heads[1])
    orders = [[built.rows(step) for step in range(1, 5)] for built in (one, of_run, of_order)]
    assert orders[0] == orders[1] != orders[2]


def test_an_epoch_is_every_example_once(task):
    built = task()
    assert built.epoch == 4  # 26 examples by 8
    assert sum(batch.count() for step in range(1, 5) for batch in built.work(step).batches) == 26
    assert built.epochs(6) == 1.5


def test_an_evaluation_does_not_depend_on_how_examples_are_batched_and_leaves_training_as_it_was(task):
    found = []
    for size in (1, 8):
        built = task("rte", f"trainer.micro_batch_size={size}")
        found.append(built.evaluate(last=False))
        assert built.evaluate(last=False) == found[-1]  # no dropout
        assert built.model.training
        assert all(p.grad is None for p in built.model.parameters())
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_an_evaluation_is_of_all_examples(task):
    built = task("stsb")
    found = built.evaluate(last=False)
    built.model.eval()
    with torch.no_grad():
        batch = built._labelled.validation["validation"].batch(range(VALIDATION))
        outputs = built._loss_and_outputs(batch)[1].squeeze(1)
    loss = (outputs - batch.labels).square().mean().item()
    assert found["validation_loss"] == pytest.approx(loss, rel=1e-5)
    assert found["validation_pearson"] == pytest.approx(pearsonr(outputs, batch.labels).statistic, abs=1e-3)


def test_a_second_validation_set_is_named_by_its_split(task):
    usual, other = task("mnli"), task("mnli", "data.validation_splits=[validation_mismatched,validation_matched]")
    assert usual.headline == ("validation_accuracy", "validation_mismatched_accuracy")
    assert other.headline == ("validation_accuracy", "validation_matched_accuracy")
    first, second = (built.evaluate(last=False) for built in (usual, other))
    assert list(first) == [
        "validation_loss", "validation_accuracy", "validation_mismatched_loss", "validation_mismatched_accuracy",
    ]  # fmt: skip
    assert second["validation_loss"] == first["validation_mismatched_loss"] != first["validation_loss"]
    assert second["validation_matched_loss"] == first["validation_loss"]


def test_the_summary_has_every_metric_at_the_last_and_the_best_step(task):
    built = task("mrpc")
    lines = [
        {"step": step, "validation_loss": 1 / step, "validation_accuracy": accuracy, "validation_f1": f1}
        for step, accuracy, f1 in ((4, math.nan, 0.9), (8, 0.7, 0.1), (12, 0.7, 0.8), (16, 0.6, 1.0))
    ]
    assert built.conclude(lines) == {
        "metric": "validation_accuracy",
        "metrics": ["validation_accuracy", "validation_f1"],
        "last": lines[3],
        "best": lines[1],  # by the first metric, the first of equals
    }


def test_the_data_are_named_with_the_weights(task, glue):
    about = task().data
    assert about["source"] == {"name": str(glue), "subset": "rte", "revision": None}
    assert about["examples"] == {"train": 26, "validation": 11}
    assert len(about["pretrained_weights"]) == 64


def test_a_resume_on_other_data_with_another_tokenizer_or_other_weights_is_refused(task, tiny_encoder, tmp_path):
    moved = shutil.copytree(tiny_encoder, tmp_path / "moved")
    words, weights = moved / "tokenizer.json", moved / "model.safetensors"
    text, tensors = words.read_text(), load_file(weights)
    state = task("rte", f"model.name={moved}").state_dict()

    def refused(name="rte"):
        with pytest.raises(SettingError, match="begun on other data"):
            task(name, f"model.name={moved}", state=state)

    refused("mrpc")
    words.write_text(text.replace('"the": 4', '"the": 5').replace('"a": 5', '"a": 4'))
    assert words.read_text() != text
    refused()
    words.write_text(text)
    task("rte", f"model.name={moved}", state=state)
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, weights, metadata={"format": "pt"})
    refused()


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("trainer.sequence_length=80", r"trainer.sequence_length is 80; allowed: .* the encoder takes, 64"),
        ("model.name=./nowhere", r"model.name is ./nowhere, and there is no such directory"),
    ],
)
def test_what_an_encoder_does_not_take_is_refused(task, word, says):
    with pytest.raises(SettingError, match=says):
        task("rte", word)


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json", "damaged"])
def test_a_directory_without_weights_or_config_is_refused_in_one_line(missing, task, tiny_encoder, tmp_path):
    broken = shutil.copytree(tiny_encoder, tmp_path / "broken")
    if missing == "damaged":
        (broken / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    else:
        (broken / missing).unlink()
    with pytest.raises(SettingError) as caught:
        task("rte", f"model.name={broken}")
    assert f"model.name is {broken}, which transformers cannot read: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_without_token_types_gets_none(task, tmp_path):
    built = task("rte", f"model.name={write_encoder(tmp_path / 'mpnet', 'mpnet')}")
    (batch,) = built.work(1).batches
    assert batch.types is None
    assert built.loss(batch).isfinite()
