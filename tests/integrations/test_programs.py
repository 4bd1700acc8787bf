"""Each program of docs/integrations.md runs; test_torchtitan.py runs torchtitan's."""

import importlib.util
import json
import sys
from types import ModuleType

import pytest
from programs import PAGE, PROGRAMS
from small import llama, rows

from adafrugal.integrations.watch import find_frugal

NEEDS = {"transformers.Trainer": "accelerate", "TRL": "trl", "Lightning": "lightning", "accelerate": "accelerate"}
READ = ("LLaMA-Factory", "axolotl")
without_accelerate = pytest.mark.skipif(
    not importlib.util.find_spec("accelerate"), reason="accelerate is an extra: make extras"
)


def test_every_program_is_run():
    assert PAGE.count("```python") == len(PROGRAMS)
    assert {*PROGRAMS} == {*NEEDS, *READ, "torchtitan"}


@pytest.mark.parametrize("heading", NEEDS)
def test_a_program_runs_as_it_stands(heading, tmp_path, monkeypatch, capsys):
    if not importlib.util.find_spec(NEEDS[heading]):
        pytest.skip(f"{NEEDS[heading]} is an extra: make extras")
    monkeypatch.chdir(tmp_path)
    exec(PROGRAMS[heading], {"__name__": "program"})
    printed = capsys.readouterr().out.splitlines()[-1]
    if heading in ("transformers.Trainer", "TRL"):
        last = json.loads(printed.replace("'", '"'))[-1]
        assert (last["density"], last["interval"]) == (pytest.approx(0.05), 4)
        assert last["state_bytes"] > 0
    else:
        assert printed == ("8" if heading == "Lightning" else "12 8")


def stand_in(monkeypatch, **modules):
    for name, found in modules.items():
        module = ModuleType(name.replace("__", "."))
        vars(module).update(found)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        outer, _, last = module.__name__.rpartition(".")
        if outer in sys.modules:
            monkeypatch.setattr(sys.modules[outer], last, module, raising=False)


def arguments(directory):
    from transformers import TrainingArguments

    return TrainingArguments(
        str(directory), max_steps=2, eval_strategy="steps", report_to="none", use_cpu=True, save_strategy="no"
    )


@without_accelerate
@pytest.mark.filterwarnings("ignore:T cannot move")
def test_llama_factorys_trainer_makes_the_optimizer_of_the_program(tmp_path, monkeypatch):
    """The calls of LLaMA-Factory's source (ff6d4d1): train/tuner.py, train/sft/trainer.py."""
    from transformers import Trainer

    trained = []

    class CustomSeq2SeqTrainer(Trainer):
        def create_optimizer(self, *args, **kwargs):
            if self.optimizer is None:
                make = sys.modules["llamafactory.train.sft.trainer"].create_custom_optimizer
                self.optimizer = make(self.model, self.args, None)
            return super().create_optimizer(*args, **kwargs)

    def run_exp(args=None, callbacks=None):
        given = {"train_dataset": rows(8), "eval_dataset": rows(2), "callbacks": callbacks}
        trained.append(CustomSeq2SeqTrainer(llama(), arguments(tmp_path), **given))
        trained[0].train()

    stand_in(
        monkeypatch,
        llamafactory={}, llamafactory__train={}, llamafactory__train__sft={},
        llamafactory__train__sft__trainer={"create_custom_optimizer": lambda *_: None},
        llamafactory__train__tuner={"run_exp": run_exp},
    )  # fmt: skip
    exec(PROGRAMS["LLaMA-Factory"], {"__name__": "program"})
    assert find_frugal(trained[0].optimizer).density == pytest.approx(0.05)


@without_accelerate
@pytest.mark.filterwarnings("ignore:T cannot move")
def test_axolotls_trainer_keeps_the_optimizer_of_the_plugin(tmp_path, monkeypatch):
    """The calls of axolotl's source (067b021): train.py, with a finished trainer."""
    from transformers import Trainer

    stand_in(monkeypatch, axolotl={}, axolotl__integrations={}, axolotl__integrations__base={"BasePlugin": object})
    exec(PROGRAMS["axolotl"], names := {"__name__": "program"})
    trainer = Trainer(llama(), arguments(tmp_path), train_dataset=rows(8), eval_dataset=rows(2))
    names["AdaFrugalPlugin"]().post_trainer_create({}, trainer)
    trainer.train()
    assert find_frugal(trainer.optimizer).density == pytest.approx(0.05)
