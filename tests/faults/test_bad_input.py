"""Random settings, right and wrong: no answer is a traceback, and no wrong one is taken."""

import random

import pytest
from torture import LONG, record_under
from wrong import ALWAYS

from adafrugal.optim.choices import STATE_FREE

RIGHT = {  # groups first: what is typed below must go with all of them, or be refused in a line
    "optimizer": ["adafrugal", "adamw", "frugal", "galore", "badam", "signsgd", "lion", "muon", "adafactor",
                  "scale", "swan", "sinkgd", "apollo", "apollo_mini", "fira", "adagalore", "adafrugal_density",
                  "adafrugal_interval", "adafrugal_whiten", "frugal_displacement"],
    "schedule": ["cosine", "cosine_restarts", "linear", "constant", "wsd"],
    "optimizer/density": ["constant", "linear", "cosine"],
    "optimizer/interval": ["constant", "loss_aware", "displacement"],
    "optimizer.lr": ["1e-3", "0", "0.5", "1e-9"],
    "optimizer.weight_decay": ["0", "0.1"],
    "optimizer.density": ["0", "0.25", "1", "0.01", "{kind:linear,start:0.5,end:0.1}"],
    "optimizer.interval": ["1", "7", "1000", "{kind:loss_aware,start:2,max:9}"],
    "optimizer.subspace": ["blocks", "columns", "rows", "slab", "randk", "randperm", "svd", "random",
                           "{kind:blocks,order:random,match:elements}", "{kind:svd,method:exact}"],
    "optimizer.state_full": ["adamw", "lion", "sgdm"],
    "optimizer.state_free": list(STATE_FREE),
    "optimizer.on_refresh": ["reset", "keep", "keep_overlap", "reset_all"],
    "optimizer.shrink": ["immediately", "at_refresh"],
    "optimizer.stagger": ["1", "2"],
    "optimizer.modules.head": ["state_full", "state_free", "split"],
    "optimizer.modules.embeddings": ["state_full", "state_free"],
    "optimizer.state_dtype": ["bfloat16", "int8", "null"],
    "optimizer.nonfinite": ["error", "skip", "null"],
    "optimizer.split_lr_scale": ["1", "0.25"],
    "schedule.warmup": ["0", "3", "0.1"],
    "trainer.steps": ["1", "2", "13"],
    "trainer.batch_size": ["1", "8"],
    "trainer.micro_batch_size": ["1", "2", "null"],
    "trainer.sequence_length": ["2", "33", "64"],
    "trainer.clip_norm": ["1", "1e-9", "null"],
    "trainer.precision": ["auto", "fp32", "bf16"],
    "trainer.on_nonfinite": ["error", "skip"],
    "trainer.update_in_backward": ["true", "false"],
    "trainer.activation_checkpointing": ["none", "layers", "selective"],
    "model.dtype": ["float32", "bfloat16"],
    "optimizer.stochastic_rounding": ["true", "false"],
    "trainer.log_every": ["1", "1000"],
    "checkpoint.every": ["1", "1000"],
    "checkpoint.keep": ["1", "3"],
    "checkpoint.best": ["true", "false"],
    "eval.every": ["1", "7", "1000"],
    "eval.tokens": ["64", "1000"],
    "eval.last_tokens": ["640", "null"],
    "data.rows": ["packed", "document"],
    "data.window_tokens": ["4096", "100000"],
    "model.num_hidden_layers": ["1", "3"],
    "model.loss_chunk_rows": ["16", "null"],
    "seed": ["0", "12345"],
    "arm": ["mine", "a.b-c_d+e=f"],
}  # fmt: skip
PERHAPS_WRONG = ["-1", "nan", "inf", "1e400", "''", "null", "x", "[1,2]", "{a:1}", "{kind:nothing}", "true", "1.5", "ρ",
                 "${nothing}", "${oc.env:NOTHING}", "../../x", "1_0", "0x10", "99999999999999999999", "[]", "???",
                 "{kind:linear,start:9,end:1}", "{_target_:os.system}"]  # fmt: skip
NUMBERS = "optimizer.lr optimizer.weight_decay optimizer.split_lr_scale trainer.clip_norm"
COUNTS = "trainer.log_every checkpoint.every checkpoint.keep eval.every model.loss_chunk_rows optimizer.interval"
SWITCHES = "checkpoint.best trainer.update_in_backward optimizer.stochastic_rounding"
# which of these are right, for which settings; all others are wrong. What is right may still not go with the rest
TAKEN = {
    "[]": "optimizer/density optimizer/interval",
    "1.5": NUMBERS,
    "1_0": f"{NUMBERS} {COUNTS} schedule.warmup trainer.steps trainer.batch_size trainer.sequence_length "
    f"{SWITCHES} model.num_hidden_layers seed",
    "99999999999999999999": f"{NUMBERS} {COUNTS} {SWITCHES} eval.tokens eval.last_tokens data.window_tokens",
    "null": "optimizer.state_dtype optimizer.nonfinite schedule.warmup trainer.micro_batch_size trainer.clip_norm "
    "eval.last_tokens model.loss_chunk_rows",
    "inf": "trainer.clip_norm",
    "1e400": "trainer.clip_norm",
    "-1": SWITCHES,
    "true": SWITCHES,
}
ARMS = {"1.5", "1_0", "99999999999999999999", "null", "inf", "1e400", "-1", "true", "nan", "''", "x", "0x10"}
ENDLESS = ("trainer.steps", "99999999999999999999")
WRONG = [*ALWAYS, "=", "a=b=c", "++x=1", "optimizer=", "optimizer@x=adamw", "optimizer.[lr]=1",
         "schedule=linear,cosine", "trainer={stepz:3}", "+model._target_=os.system", "hydra.run.dir=/proc/x",
         "cache_root=/proc/nowhere", "run_root=/dev/null", "data=text data.source=/no/such/*.txt"]  # fmt: skip


def typed(chosen):
    """Words, and whether one of them is certainly wrong."""
    words = [f"{key}={chosen.choice(RIGHT[key])}" for key in chosen.sample(list(RIGHT), chosen.randint(0, 6))]
    kind = chosen.random()
    if kind < 0.3:
        return words, False
    if kind < 0.65:
        place, key, value = chosen.randrange(len(words) + 1), chosen.choice(list(RIGHT)), chosen.choice(PERHAPS_WRONG)
        if (key, value) == ENDLESS:  # which is right
            value = "x"
        taken = value in ARMS if key == "arm" else key in TAKEN.get(value, "").split()
        others = [word for word in words if not word.startswith(f"{key}=")]  # of which the last would count
        return [*others[:place], f"{key}={value}", *others[place:]], not taken
    return words + chosen.choice(WRONG).split(), True


@pytest.mark.parametrize("seed", range(300 if LONG else 10))
def test_whatever_is_typed_gets_an_answer(seed, forks, cache_root, tmp_path, tally):
    words, wrong = typed(random.Random(seed))
    base = ["scale=smoke", "tracking=local", f"run_root={tmp_path / 'runs'}", f"cache_root={cache_root}"]
    done = forks(*base, *words, cwd=tmp_path)
    told = f"{words}: {done}"
    assert "Traceback" not in done.err, told
    assert done.code in ((2,) if wrong else (0, 1, 2)), told
    assert done.seconds < 120, told
    if done.code == 0:
        record = record_under(tmp_path / "runs")
        assert record.status == "finished"
        assert record.summary()["steps"] == record.metrics()[-1]["step"]
        tally("inputs: taken")
        return
    errors = [line for line in done.err.splitlines() if not line.startswith("warning")]
    assert len(errors) == 1, told
    assert errors[0].startswith("error: "), told
    assert len(errors[0]) > 20, told
    statuses = [file.read_text() for file in (tmp_path / "runs").glob("*/*/status.json")]
    assert not any("running" in text for text in statuses), told
    if done.code == 2 and not statuses:
        assert not any("Hydra" in line or "omegaconf" in line.lower() for line in errors), told
    tally("inputs: refused in one line" if done.code == 2 else "inputs: failed in one line")
