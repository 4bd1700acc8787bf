import csv

import pytest
import torch
from small import adafrugal, llama, rows

from adafrugal.optim import Frugal, LossAware, split_parameters

pytest.importorskip("lightning", reason="lightning is an extra: make extras")
import lightning.pytorch as lightning
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils.data import DataLoader

from adafrugal.integrations.lightning import AdaFrugalCallback


class Module(lightning.LightningModule):
    def __init__(self, name="val_loss", **options):
        super().__init__()
        self.model, self.name, self.options = llama(), name, adafrugal(**options)

    def training_step(self, batch, index):
        return self.model(**batch).loss

    def validation_step(self, batch, index):
        self.log(self.name, self.model(**batch).loss)

    def configure_optimizers(self):
        return Frugal(split_parameters(self), **self.options)


def fit(directory, *, module=None, checkpoint=None, logger=False, callbacks=(), callback=None, batches=64, **changed):
    module = module or Module()
    settings = {
        "max_steps": 6, "val_check_interval": 2, "log_every_n_steps": 2, "accelerator": "cpu",
        "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": bool(callbacks),
    }  # fmt: skip
    trainer = lightning.Trainer(
        default_root_dir=directory,
        logger=logger,
        callbacks=[callback or AdaFrugalCallback(), *callbacks],
        **settings | changed,
    )
    trainer.fit(module, DataLoader(rows(64)[:batches], 2), DataLoader(rows(4), 4), ckpt_path=checkpoint)
    return module, trainer.optimizers[0]


def in_ones_own_loop(steps, accumulation, observed):
    model = llama()
    optimizer = Frugal(split_parameters(model), **adafrugal())
    batches = iter(DataLoader(rows(64), 2))
    for step in range(1, steps + 1):
        for _ in range(accumulation):
            (model(**next(batches)).loss / accumulation).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in observed:
            with torch.no_grad():
                optimizer.observe(model.eval()(**next(iter(DataLoader(rows(4), 4)))).loss.item())
            model.train()
    return model, optimizer


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize(
    ("accumulation", "interval", "observed"), [(1, 1, [2, 4, 6]), (2, 2, [2, 4, 6]), (2, 6, [3, 6])]
)
def test_lightning_does_what_ones_own_loop_does(tmp_path, accumulation, interval, observed):
    """Validations come every `interval` batches, after a sanity check; every second optimizer step a loss is due."""
    module, optimizer = fit(tmp_path, accumulate_grad_batches=accumulation, val_check_interval=interval)
    model, ours = in_ones_own_loop(6, accumulation, observed)
    assert same(module.model, model)
    assert (optimizer.interval, optimizer.density) == (ours.interval, ours.density)
    assert ours.interval == 3 ** (len(observed) - 1)


def test_a_resumed_run_continues_bit_for_bit(tmp_path):
    """Validations are made at steps 3, 6, 9 and 12. Those at 6 and 12 are observed, since the others come too early."""
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=8, save_top_k=-1)
    interval = LossAware(1, 50, factor=3.0, threshold=1e9, every=6)
    changed = {"batches": 2, "max_steps": 12, "val_check_interval": 1.0, "check_val_every_n_epoch": 3}
    whole, a = fit(tmp_path, callbacks=[save], module=Module(interval=interval), **changed)
    other, b = fit(tmp_path, checkpoint=tmp_path / "step=8.ckpt", module=Module(interval=interval), **changed)
    assert same(whole, other)
    assert a.checksum() == b.checksum()
    assert a.state_dict()["param_groups"] == b.state_dict()["param_groups"]
    assert a.interval == 3


def test_neither_a_sanity_check_nor_a_validation_without_training_is_observed(tmp_path):
    """Also where the optimizer has made steps before, in another run or with another callback."""

    class Continued(Module):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            optimizer.load_state_dict(saved)
            return optimizer

    callback = AdaFrugalCallback()
    _, first = fit(tmp_path, max_steps=2, callback=callback)
    saved = first.state_dict()
    assert first.param_groups[0]["interval"].last_loss is not None
    _, second = fit(tmp_path, module=Continued(), max_steps=1, callback=callback)
    assert second.param_groups[0]["steps"] == 3
    assert second.interval == first.interval == 1
    _, third = fit(tmp_path, max_steps=4, callback=callback)
    assert third.interval == 3, "observed at 2 and 4, since another training began"
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[callback])
    trainer.validate(Module(), DataLoader(rows(4), 4), verbose=False)


def test_the_logger_has_density_interval_and_bytes(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    _, optimizer = fit(tmp_path, logger=logger, accumulate_grad_batches=2)
    lines = [line for line in csv.DictReader((tmp_path / "metrics.csv").open()) if line["density"]]
    assert [int(line["step"]) for line in lines] == [2, 4, 6]
    assert float(lines[-1]["state_bytes"]) == optimizer.state_bytes().total
    assert float(lines[-1]["density"]) == pytest.approx(optimizer.density)
    assert [float(line["interval"]) for line in lines] == [1, 1, 3], "the loss of a step is observed after its line"


def test_all_processes_observe_the_same_loss(tmp_path, monkeypatch):
    def mean(strategy, tensor, group=None, reduce_op="mean"):
        return tensor * 0 + 7 if reduce_op == "mean" else tensor

    monkeypatch.setattr(SingleDeviceStrategy, "reduce", mean)
    _, optimizer = fit(tmp_path, max_steps=2)
    assert optimizer.param_groups[0]["interval"].last_loss == 7


def test_what_cannot_be_observed_is_said(tmp_path):
    with pytest.raises(ValueError, match="no val_loss was logged; there is loss: AdaFrugalCallback"):
        fit(tmp_path, module=Module("loss"))
    with pytest.raises(ValueError, match="nothing is validated"):
        fit(tmp_path, limit_val_batches=0)
    with pytest.warns(UserWarning, match="observed after 5000 steps, the run has 2"):
        fit(tmp_path, module=Module(interval=LossAware(1, 50)), max_steps=2)
    fit(tmp_path, module=Module("loss", interval=3), limit_val_batches=0)
