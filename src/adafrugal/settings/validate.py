"""Which values of settings are possible, and which go together.

Each check refuses the first that is not, with a line that says what was given, what is allowed and what to do. Like
`config`, this imports nothing heavy.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

from adafrugal.optim import controls
from adafrugal.optim.choices import NAMES, POLICIES, SUBSPACES, TREATMENTS
from adafrugal.settings.schema import (
    COMPILE_MODES,
    METRICS,
    NORMALIZATIONS,
    SCHEMAS,
    TOKENIZERS,
    Settings,
    density_of_rank,
    is_plain_name,
    run_steps,
    trained_size,
    with_run_length,
)
from adafrugal.system.errors import SettingError


def refuse_impossible(settings: Settings) -> None:
    """Refuse values that are impossible, or do not go together.

    Raises:
        SettingError: the first of them, in one line.
    """
    for holds in _CHECKS:
        holds(settings)


def refuse_uninstalled(settings: Settings) -> None:
    """Refuse what needs a package that only some settings need, and that is not there.

    Raises:
        SettingError: with the package's name.
    """
    o, package = settings.optimizer, getattr(settings.model, "package", None)
    needed = [
        ("optimizer", o.kind, {"lora": "peft", "adamw_8bit": "torchao"}.get(o.kind)),
        ("model.package", package, package),
    ]
    for name, given, module in needed:
        if module is not None:
            allowed = f"what is installed; pip install {module.replace('_', '-')}"
            _need(find_spec(module) is not None, name, given, allowed)


def nearest(name: str, allowed: Iterable[str]) -> str:
    """What is allowed, and the nearest of it to what was given, for the end of a message."""
    allowed = [a for a in allowed if not a.startswith("schema_")]
    near = difflib.get_close_matches(name, allowed, n=1) or [a for a in allowed if a.rpartition("/")[2] == name]
    guess = f"did you mean {near[0]}? " if near else ""
    return f"{guess}allowed: {', '.join(allowed) or 'nothing'}"


def _need(held: bool, name: str, given: Any, allowed: str) -> None:
    if not held:
        written = {None: "null", True: "true", False: "false"}.get(given, given) if _is_plain(given) else given
        raise SettingError(f"{name} is {written}; allowed: {allowed}")


def _is_plain(given: Any) -> bool:
    return given is None or isinstance(given, bool)


def _one_of(name: str, given: Any, allowed: Iterable[str]) -> None:
    if not isinstance(given, str) or given not in allowed:
        raise SettingError(f"{name} is {given!r}; {nearest(str(given), allowed)}")


def _check_kinds(s: Settings) -> None:
    for group in SCHEMAS:
        node = getattr(s, group)
        if node.kind != type(node)().kind:
            allowed = f"{type(node)().kind}, which comes with the file; to choose another write {group}=…"
            raise SettingError(f"{group}.kind is {node.kind!r}; allowed: {allowed}")


def _check_run(s: Settings) -> None:
    _need(0 <= s.seed < 2**63, "seed", s.seed, "a whole number from 0 to 2^63 − 1")
    t = s.trainer
    _need(1 <= t.batch_size <= 2**32, "trainer.batch_size", t.batch_size, "1 to 2^32")
    _need(t.log_every >= 1, "trainer.log_every", t.log_every, "1 or more")
    _check_length(s)
    _need(t.sequence_length >= 2, "trainer.sequence_length", t.sequence_length, "2 or more")
    micro = t.micro_batch_size
    if micro is not None:
        allowed = f"a divisor of trainer.batch_size ({t.batch_size}), such as {_near_divisors(t.batch_size, micro)}"
        _need(micro >= 1 and t.batch_size % micro == 0, "trainer.micro_batch_size", micro, allowed)
    _need(t.compile in (True, False, "auto"), "trainer.compile", t.compile, UNIONS["trainer.compile"])
    _one_of("trainer.compile_mode", t.compile_mode, COMPILE_MODES)
    _need(t.clip_norm is None or t.clip_norm > 0, "trainer.clip_norm", t.clip_norm, "above 0, or null for none")
    _one_of("trainer.precision", t.precision, ("auto", "fp32", "bf16", "fp16"))
    _one_of("trainer.device", t.device, ("auto", "cpu", "cuda"))
    _one_of("trainer.on_nonfinite", t.on_nonfinite, ("error", "skip"))
    _need(t.max_skips >= 1, "trainer.max_skips", t.max_skips, "1 or more; trainer.on_nonfinite=error leaves out none")
    _need(s.checkpoint.every >= 1, "checkpoint.every", s.checkpoint.every, "1 or more")
    _need(s.checkpoint.keep >= 1, "checkpoint.keep", s.checkpoint.keep, "1 or more")
    if s.tracking.kind == "wandb":
        _one_of("tracking.mode", s.tracking.mode, ("offline", "online"))
    _need(is_plain_name(s.arm), "arm", repr(s.arm), "letters, digits and . _ - + =, since it names the run's directory")


def _check_memory(s: Settings) -> None:
    """What lowers memory, and what it does not go with."""
    t = s.trainer
    _one_of("trainer.activation_checkpointing", t.activation_checkpointing, ("none", "layers", "selective"))
    if getattr(s.model, "dtype", "float32") == "bfloat16":
        allowed = "bf16, since model.dtype is bfloat16"
        _need(t.precision == "bf16", "trainer.precision", t.precision, allowed)
    budget = getattr(s.optimizer, "fit_gib", None)
    if budget is not None:
        is_size = isinstance(budget, int | float) and not isinstance(budget, bool) and 0 < budget < float("inf")
        _need(is_size, "optimizer.fit_gib", budget, "GiB of memory, above 0; or null")
        allowed = "null, since only what is trained from random weights is estimated"
        _need(s.task.kind == "pretrain", "optimizer.fit_gib", budget, allowed)
    if t.update_in_backward:
        _check_update_in_backward(s)


def _check_parallel(s: Settings) -> None:
    """Several processes, and what does not go with them."""
    t, o = s.trainer, s.optimizer
    _one_of("trainer.parallel", t.parallel, ("none", "ddp", "fsdp"))
    _need(0 < t.timeout < float("inf"), "trainer.timeout", t.timeout, "seconds, above 0")
    _need(t.replicas >= 1, "trainer.replicas", t.replicas, "1 or more")
    if t.parallel != "fsdp":
        only = "with trainer.parallel=fsdp"
        _need(t.replicas == 1, "trainer.replicas", t.replicas, f"1, or more {only}")
        _need(not t.offload, "trainer.offload", t.offload, f"false, or true {only}")
    if t.parallel == "none":
        return
    alone = "none, since dropout draws on several processes what it does not draw on one"
    _need(s.task.kind == "pretrain", "trainer.parallel", t.parallel, alone)
    if t.parallel == "ddp":
        whole = "false with trainer.parallel=ddp, whose gradients are summed in buckets; or trainer.parallel=fsdp"
        _need(not t.update_in_backward, "trainer.update_in_backward", t.update_in_backward, whole)
        modules = getattr(o, "modules", None)
        for name in ("embeddings", "norms", "head", "unsplit"):
            waited = "another with trainer.parallel=ddp, which waits for every gradient; or trainer.parallel=fsdp"
            given = getattr(modules, name, None)
            _need(given != "frozen", f"optimizer.modules.{name}", given, waited)
        return
    _need(t.precision != "fp16", "trainer.precision", t.precision, "fp32, bf16 or auto with trainer.parallel=fsdp")
    budget = getattr(o, "fit_gib", None)
    none = "null with trainer.parallel=fsdp, whose shards are not estimated"
    _need(budget is None, "optimizer.fit_gib", budget, none)
    able = "adamw, or one of FRUGAL's family, with trainer.parallel=fsdp: others need whole matrices; ddp takes all"
    _need(o.kind in ("adamw", "frugal"), "optimizer.kind", o.kind, able)
    if o.kind == "frugal":
        described = dict(o.subspace) if isinstance(o.subspace, dict) else {"kind": o.subspace}
        holds = described["kind"] in ("blocks", "columns", "slab") or described.get("side") == "right"
        allowed = "blocks, columns, slab, {kind:svd,side:right} or {kind:random,side:right} with trainer.parallel=fsdp"
        _need(holds, "optimizer.subspace", o.subspace, f"{allowed}, which divides matrices by rows; ddp takes all")


def _check_update_in_backward(s: Settings) -> None:
    t, nonfinite = s.trainer, getattr(s.optimizer, "nonfinite", None)
    clashes = [  # whether it is so, what it is, and why the two do not go together
        (t.micro_batch_size not in (None, t.batch_size), f"trainer.micro_batch_size={t.micro_batch_size}",
         f"each backward pass is a step then; allowed with it: {t.batch_size}, or null"),
        (t.clip_norm is not None, f"trainer.clip_norm={t.clip_norm}", "the norm is of all gradients at once"),
        (t.precision == "fp16", "trainer.precision=fp16", "its gradients are scaled back all at once; bf16 needs none"),
        (t.compile is True, "trainer.compile=true", "compiled code gives all gradients at once"),
        (nonfinite is not None, f"optimizer.nonfinite={nonfinite}",
         "it looks at all gradients at once; trainer.on_nonfinite looks at the loss"),
    ]  # fmt: skip
    for is_so, what, why in clashes:
        if is_so:
            raise SettingError(f"trainer.update_in_backward is true; allowed: false with {what}, since {why}")


def _check_length(s: Settings) -> None:
    """How long the run is, and how often it evaluates; only labelled examples make epochs that are known."""
    t, has_epochs = s.trainer, s.task.kind == "finetune"
    if t.steps is not None:
        _need(t.steps >= 1, "trainer.steps", t.steps, "1 or more")
        both = f"null, since trainer.steps is {t.steps}" + ("; or trainer.steps=null" if has_epochs else "")
        _need(t.epochs is None, "trainer.epochs", t.epochs, both)
    else:
        _need(has_epochs, "trainer.steps", None, f"1 or more; task={s.task.kind} has no epochs that are known before")
        _need(0 < (t.epochs or 0) < float("inf"), "trainer.epochs", t.epochs, "above 0, since trainer.steps is null")
    allowed = "1 or more" + (", or null for an epoch" if has_epochs else "")
    holds = has_epochs if s.eval.every is None else s.eval.every >= 1
    _need(holds, "eval.every", s.eval.every, allowed)
    if not has_epochs:
        least = t.sequence_length
        _need(s.eval.tokens >= least, "eval.tokens", s.eval.tokens, f"one sequence ({least}) or more")
        last, allowed = s.eval.last_tokens, f"one sequence ({least}) or more, or null for eval.tokens"
        _need(last is None or last >= least, "eval.last_tokens", last, allowed)


def _near_divisors(number: int, given: int) -> str:
    """The divisors of a number that are nearest to what was given, in order."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    divisors = {*small, *(number // d for d in small)}
    return ", ".join(str(d) for d in sorted(sorted(divisors, key=lambda d: abs(d - given))[:5]))


def _check_task(s: Settings) -> None:
    """A task, data and a model that go together."""
    for group, (kinds, such) in _GO_TOGETHER[s.task.kind].items():
        kind, task = getattr(s, group).kind, s.task.kind
        if kind not in kinds:
            raise SettingError(
                f"{group} is of kind {kind} and task is {task}; allowed: a {group} file of kind {' or '.join(kinds)}, "
                f"such as {group}={such}, or another task"
            )


def _check_model(s: Settings) -> None:
    {"llama": _check_llama, "encoder": _check_encoder}[s.model.kind](s)


def _check_encoder(s: Settings) -> None:
    m = s.model
    if m.package is not None:
        _need(m.package.isidentifier(), "model.package", m.package, "the name by which Python imports a package")
        _need(m.revision is None, "model.revision", m.revision, "null, since a package is what is installed")
        _need(m.name is None, "model.name", m.name, "null, since model.package is given; or model.package=null")
        return
    _need(bool(m.name), "model.name", m.name, "a hub repository or a directory, such as FacebookAI/roberta-base")


def _check_llama(s: Settings) -> None:
    m = s.model
    for name in ("vocabulary_size", "hidden_size", "intermediate_size", "num_attention_heads"):
        _need(getattr(m, name) >= 1, f"model.{name}", getattr(m, name), "1 or more")
    layers = m.num_hidden_layers
    _need(1 <= layers <= 10_000, "model.num_hidden_layers", layers, "1 to 10,000")
    heads, hidden = m.num_attention_heads, m.hidden_size
    _need(hidden % 2 == 0, "model.hidden_size", hidden, "an even number")
    possible = _near_divisors(hidden // 2, heads)
    allowed = f"as many heads of an even size as make up model.hidden_size ({hidden}), such as {possible}"
    _need(hidden // 2 % heads == 0, "model.num_attention_heads", heads, allowed)
    _need(0 < m.rms_norm_eps < 1, "model.rms_norm_eps", m.rms_norm_eps, "above 0, below 1")
    _need(0 <= m.initializer_range < 10, "model.initializer_range", m.initializer_range, "0 or more, below 10")
    longest = m.max_position_embeddings
    length = s.trainer.sequence_length
    _need(length <= longest, "trainer.sequence_length", length, f"up to model.max_position_embeddings ({longest})")
    _one_of("model.dtype", m.dtype, ("float32", "bfloat16"))
    rows = m.loss_chunk_rows
    is_possible = rows == "auto" if isinstance(rows, str) else rows is None or rows >= 1
    _need(is_possible, "model.loss_chunk_rows", rows, UNIONS["model.loss_chunk_rows"])


def _check_data(s: Settings) -> None:
    if s.data.kind == "labelled":
        _check_labelled(s)
    else:
        _check_text(s)


def _check_labelled(s: Settings) -> None:
    d = s.data
    _need(bool(d.source), "data.source", d.source, "a hub repository such as nyu-mll/glue, or a directory like it")
    _need(len(d.fields) in (1, 2), "data.fields", list(d.fields), "the name of one column, or of the two of a pair")
    _need(d.classes is None or d.classes >= 2, "data.classes", d.classes, "2 or more, or null where labels are scores")
    allowed = "one split or more, such as [validation]"
    _need(bool(d.validation_splits), "data.validation_splits", list(d.validation_splits), allowed)
    _need(d.split not in d.validation_splits, "data.split", d.split, "a split that is not in data.validation_splits")
    _need(d.examples is None or d.examples >= 1, "data.examples", d.examples, "1 or more, or null for all")
    for name in ("validation_splits", "metrics", "fields"):
        given = list(getattr(d, name))
        _need(len(set(given)) == len(given), f"data.{name}", given, "each once")
    known = METRICS["scores" if d.classes is None else "classes"]
    _need(bool(d.metrics), "data.metrics", list(d.metrics), f"one or more of {', '.join(known)}")
    for metric in d.metrics:
        _one_of("data.metrics", metric, known)
    if "f1" in d.metrics:
        _need(d.classes == 2, "data.metrics", list(d.metrics), "f1 with two classes only, of which 1 is the one found")


def _check_text(s: Settings) -> None:
    d = s.data
    _one_of("data.rows", d.rows, ("document", "packed"))
    packed = "false, since a row is one document anyway; or data.rows=packed"
    _need(d.rows == "packed" or not d.mask_documents, "data.mask_documents", d.mask_documents, packed)
    _need(d.window_tokens >= 1024, "data.window_tokens", d.window_tokens, "1024 or more")
    limit = d.store_limit_gib
    _need(limit is None or limit > 0, "data.store_limit_gib", limit, "above 0, or null for none")
    processes = d.processes
    _need(processes is None or 1 <= processes <= 1024, "data.processes", processes, "1 or more, or null for every core")
    if d.kind == "corpus":
        _need(bool(d.source), "data.source", d.source, "a hub repository, a directory, or files such as 'corpus/*.txt'")
        _one_of("data.sample_by", d.sample_by, ("line", "paragraph", "document"))
        _need(0 < d.held_out < 1, "data.held_out", d.held_out, "a share of the documents, above 0 and below 1")
        other = f"another split than data.split ({d.split}), or null to hold documents out"
        _need(d.validation_split != d.split, "data.validation_split", d.validation_split, other)
    _check_tokenizer(s)


def _check_tokenizer(s: Settings) -> None:
    t, most = s.data.tokenizer, s.model.vocabulary_size
    _one_of("data.tokenizer.kind", t.kind, TOKENIZERS)
    _one_of("data.tokenizer.model_type", t.model_type, ("bpe", "unigram"))
    _one_of("data.tokenizer.normalization", t.normalization, NORMALIZATIONS)
    _need(t.sample_bytes >= 1000, "data.tokenizer.sample_bytes", t.sample_bytes, "1000 or more")
    what = {"pretrained": "a hub repository or a directory, such as t5-base", "sentencepiece": "a .model file"}
    if t.kind != "train":
        _need(bool(t.name), "data.tokenizer.name", t.name, f"{what[t.kind]}, or data.tokenizer.kind=train")
        is_model = str(t.name).endswith(".model")
        allowed = f"{what[t.kind]}; data.tokenizer.kind is {t.kind}, the others are for other files"
        _need(is_model == (t.kind == "sentencepiece"), "data.tokenizer.name", t.name, allowed)
        return
    allowed = "null, since data.tokenizer.kind is train; or data.tokenizer.kind=pretrained (or sentencepiece)"
    _need(t.name is None, "data.tokenizer.name", t.name, allowed)
    _need(most >= 300, "model.vocabulary_size", most, "300 or more, since a tokenizer has 256 pieces for bytes alone")
    size = trained_size(s)
    _need(300 <= size <= most, "data.tokenizer.vocabulary_size", size, f"300 to model.vocabulary_size ({most})")


def _check_schedule(s: Settings) -> None:
    run, schedule = run_steps(s), s.schedule
    steps = run
    if getattr(schedule, "cycle", None) is not None:
        _need(1 <= schedule.cycle <= steps, "schedule.cycle", schedule.cycle, f"1 to trainer.steps ({steps})")
        steps = schedule.cycle
    warmup, longest = schedule.warmup, "schedule.cycle" if steps != run else "trainer.steps"
    if warmup is not None:
        many = steps if s.trainer.steps or steps != run else "as many as its epochs have"
        allowed = f"0 to below {longest} ({many}), a share of it below 1, or null for a tenth"
        _need(0 <= warmup < (1 if isinstance(warmup, float) else steps), "schedule.warmup", warmup, allowed)
    if hasattr(schedule, "floor"):
        _need(0 <= schedule.floor <= 1, "schedule.floor", schedule.floor, "a share of the learning rate, 0 to 1")


def _check_rates(s: Settings) -> None:
    o = s.optimizer
    rate = getattr(s.task, "lr", 0)
    _need(0 <= rate < float("inf"), "task.lr", rate, "0 or more")
    for name in ("lr", "eps", "weight_decay", "split_lr_scale", "state_free_lr_scale"):
        value = getattr(o, name, 0)
        _need(0 <= value < float("inf"), f"optimizer.{name}", value, "0 or more")
    for name, betas in (("betas", getattr(o, "betas", [0, 0])), ("momentum", [getattr(o, "momentum", 0)] * 2)):
        within = len(betas) == 2 and all(0 <= b < 1 for b in betas)
        given, allowed = (list(betas), "two numbers") if name == "betas" else (betas[0], "a number")
        _need(within, f"optimizer.{name}", given, f"{allowed} from 0 to below 1")
    if o.kind in ("adamw", "adamw_8bit", "muon"):
        scale = o.split_lr_scale
        _need(scale > 0, "optimizer.split_lr_scale", scale, "above 0; optimizer=frugal takes 0, too")
    if o.kind == "adafactor":
        _need(-1 <= o.beta2_decay <= 0, "optimizer.beta2_decay", o.beta2_decay, "-1 to 0")
        _need(1 <= o.clip < float("inf"), "optimizer.clip", o.clip, "1 or more")
    if o.kind == "muon":
        _need(1 <= o.ns_steps < 100, "optimizer.ns_steps", o.ns_steps, "1 to 99")
    if o.kind == "adamw_8bit":
        _need(o.block_size >= 1, "optimizer.block_size", o.block_size, "1 or more")
    if o.kind == "lora":
        _check_lora(s)


def _check_lora(s: Settings) -> None:
    o = s.optimizer
    pretrained = "an optimizer that trains all weights, since these are random; or task=finetune"
    _need(s.task.kind == "finetune", "optimizer", "lora", pretrained)
    _need(o.rank >= 1, "optimizer.rank", o.rank, "1 or more")
    _need(
        o.split_lr_scale == 1, "optimizer.split_lr_scale", o.split_lr_scale, "1, since optimizer.alpha scales adapters"
    )
    _need(0 < o.alpha < float("inf"), "optimizer.alpha", o.alpha, "above 0")
    _need(0 <= o.dropout < 1, "optimizer.dropout", o.dropout, "a share from 0 to below 1")
    _need(bool(o.targets), "optimizer.targets", list(o.targets), "names of modules, such as [query, value]")


def _check_frugal(s: Settings) -> None:
    if s.optimizer.kind != "frugal":
        return
    filled: dict[str, Callable[[Any], controls.Control]] = {
        "rank" if s.optimizer.rank is not None else "density": controls.density,
        "interval": controls.interval,
    }
    _check_rank(s)
    for name, build in filled.items():
        given = getattr(s.optimizer, name)
        try:
            build(with_run_length(density_of_rank(given, _ANY_SIZE) if name == "rank" else given, run_steps(s)))
        except ValueError as error:
            hint = f"; to choose another kind write optimizer/{name}=…" if " has no " in str(error) else ""
            raise SettingError(f"optimizer.{name}: {error}{hint}") from None
    for name, allowed in NAMES.items():
        if getattr(s.optimizer, name) not in allowed:
            _one_of(f"optimizer.{name}", getattr(s.optimizer, name), [a or "null" for a in allowed])
    modules = s.optimizer.modules
    for name in ("embeddings", "norms", "head", "unsplit"):
        _one_of(f"optimizer.modules.{name}", getattr(modules, name), TREATMENTS)
    some = "names of modules, such as ['*.query', '*.value'], or null for all"
    _need(modules.split is None or bool(modules.split), "optimizer.modules.split", modules.split, some)
    _check_subspace(s)


def _check_rank(s: Settings) -> None:
    rank, density = s.optimizer.rank, s.optimizer.density
    if rank is None or density is None:
        neither = "a share from 0 to 1, or a control such as optimizer/density=linear; or give optimizer.rank"
        _need(density is not None or rank is not None, "optimizer.density", density, neither)
        values = [v for k, v in rank.items() if k in ("value", "start", "end")] if isinstance(rank, dict) else [rank]
        whole = all(isinstance(v, int | float) and 0 <= v <= _ANY_SIZE for v in values) or rank is None
        _need(whole, "optimizer.rank", rank, "a number of columns, 0 or more, or a control of such numbers")
        return
    raise SettingError(
        f"optimizer.rank is {rank} and optimizer.density is {density}: each says how much is selected; set one to null"
    )


def _check_subspace(s: Settings) -> None:
    o = s.optimizer
    described = dict(o.subspace) if isinstance(o.subspace, dict) else {"kind": o.subspace}
    _one_of("optimizer.subspace", described.get("kind"), SUBSPACES)
    kind = described.pop("kind")
    for key, value in described.items():
        if key not in SUBSPACES[kind]:
            raise SettingError(f"optimizer.subspace.{key}: no such setting; {nearest(key, SUBSPACES[kind])}")
        _one_of(f"optimizer.subspace.{key}", value, SUBSPACES[kind][key])
    _one_of(f"optimizer.on_refresh with {kind}", o.on_refresh, POLICIES[kind])
    if kind == "blocks":
        _need(o.stagger == 1, "optimizer.stagger", o.stagger, "1 with blocks, which choose among all matrices at once")
    by_columns = "null, since whole matrices take turns; or optimizer.subspace=columns"
    _need(o.rank is None or kind != "blocks", "optimizer.rank with blocks", o.rank, by_columns)
    longest = int(controls.interval(with_run_length(o.interval, run_steps(s))).at(1))
    _need(1 <= o.stagger <= longest, "optimizer.stagger", o.stagger, f"1 to the interval ({longest})")
    counted = kind == "blocks" and described.get("match", "count") == "count" and s.model.kind == "llama"
    if counted and o.state_free == "none":
        by_layer, layers = described.get("unit") == "layer", s.model.num_hidden_layers
        density = float(controls.density(with_run_length(o.density, run_steps(s))).at(0))
        count = int(density * layers) if by_layer else round(density * 7 * layers)
        blocks = f"{layers} layers" if by_layer else f"{7 * layers} matrices"
        allowed = f"one that selects at least one of the {blocks}, since optimizer.state_free=none trains no other"
        _need(count > 0, "optimizer.density", density, allowed)
    if kind != "blocks" and o.modules.norms == "split":
        allowed = f"state_full, state_free, frozen; {kind} splits only matrices, optimizer.subspace=blocks all"
        raise SettingError(f"optimizer.modules.norms is split; allowed: {allowed}")
    if described.get("unit") == "layer" and "split" in (o.modules.embeddings, o.modules.norms, o.modules.head):
        raise SettingError("optimizer.modules: with blocks of unit layer nothing outside the layers can be split")


UNIONS = {  # settings of several types, and what they take
    "trainer.compile": "auto, true, false",
    "model.loss_chunk_rows": "auto, 1 or more, or null for no chunks",
}
_ANY_SIZE = 1 << 20  # larger than any model's hidden size
_GO_TOGETHER = {  # task -> group -> the kinds that it takes, and a file of such a kind
    "pretrain": {"data": (("embedded", "corpus"), "embedded"), "model": (("llama",), "llama_3m")},
    "finetune": {"data": (("labelled",), "rte"), "model": (("encoder",), "roberta_base")},
}
_CHECKS = (
    _check_kinds,
    _check_task,
    _check_run,
    _check_model,
    _check_data,
    _check_schedule,
    _check_rates,
    _check_frugal,
    _check_memory,
    _check_parallel,
)
