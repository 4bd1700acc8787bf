"""Build parameter groups and optimizers from the settings, for every file of conf/optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from adafrugal.optim import Frugal, ParameterGroups, Rule, Several, default_rules, split_parameters
from adafrugal.optim.baselines.apollo import Apollo
from adafrugal.optim.baselines.fira import Fira
from adafrugal.optim.baselines.scale import Scale
from adafrugal.settings.canonical import with_run_length
from adafrugal.settings.schema import LoraSettings, Settings
from adafrugal.system.errors import SettingError


def groups(settings: Settings, model: torch.nn.Module) -> ParameterGroups:
    """Sort a model's parameters into groups.

    Raises:
        SettingError: a pattern of `optimizer.modules` names nothing, or nothing is split.
    """
    modules, is_lora = getattr(settings.optimizer, "modules", None), isinstance(settings.optimizer, LoraSettings)
    rules = default_rules(**asdict(modules)) if modules else default_rules()
    if settings.optimizer.kind == "scale":
        rules = _rules_of_scale(rules, settings.optimizer.momentum, model)
    if is_lora:  # of the blocks, only adapters are trained
        rules = [replace(rule, name="adapters") if rule.treatment == "split" else rule for rule in rules]
    try:
        found = split_parameters(model, rules)
    except ValueError as error:
        here = f"the Linear modules in the blocks of {type(model).__name__} are called {_linear_in_blocks(model)}"
        raise SettingError(f"optimizer.modules: {error}; {here}") from error
    if is_lora:
        found.frozen = [(name, p.numel()) for name, p in model.named_parameters() if not p.requires_grad]
    return found


def _rules_of_scale(rules: Sequence[Rule], momentum: float, model: torch.nn.Module) -> list[Rule]:
    """SCALE has the embeddings and the head, too; a matrix that is both is the last layer, and has its momentum."""
    heads = {module.weight for module in _outside_blocks(model) if isinstance(module, torch.nn.Linear)}
    embeddings = ((name, m.weight) for name, m in model.named_modules() if isinstance(m, torch.nn.Embedding))
    tied = "|".join(name for name, weight in embeddings if weight in heads)
    columns, last = {"dim": -2}, {"dim": -1, "momentum": momentum}
    conv1d, embedding, linear = ("transformers.pytorch_utils.Conv1D",), (torch.nn.Embedding,), (torch.nn.Linear,)
    in_blocks, *rest = rules
    found = [
        Rule("Conv1D in blocks", "split", conv1d, in_blocks=True, optional=True, settings=columns),
        in_blocks,
        *([Rule("tied head", "state_full", embedding, path=tied, settings=last)] if tied else []),
        Rule("embeddings", "state_full", embedding, optional=True, settings=columns),
        Rule("head", "state_full", linear, in_blocks=False, optional=True, settings=last),
    ]
    return [*(replace(rule, tensors="matrices") for rule in found), *rest]


def adapt(settings: Settings, model: torch.nn.Module) -> None:
    """Inject LoRA's adapters, if the optimizer is LoRA, and freeze all else but Linear modules outside the blocks.

    Those are the head, which FRUGAL's arms train too.

    Raises:
        SettingError: the model has no module of the names in `optimizer.targets`.
    """
    o = settings.optimizer
    if not isinstance(o, LoraSettings):
        return
    import peft

    outside = (module for module in _outside_blocks(model) if isinstance(module, torch.nn.Linear))
    head = [param for module in outside for param in module.parameters()]
    adapters = peft.LoraConfig(r=o.rank, lora_alpha=o.alpha, lora_dropout=o.dropout, target_modules=list(o.targets))
    try:
        peft.inject_adapter_in_model(adapters, model)
    except ValueError as error:
        here = f"Linear in its blocks: {_linear_in_blocks(model)}"
        raise SettingError(f"optimizer.targets is {list(o.targets)}: {error} {here}") from error
    for param in head:
        param.requires_grad_(True)


def _blocks(model: torch.nn.Module) -> tuple[str, ...]:
    """Prefixes of the names in the transformer blocks."""
    return tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList))


def _outside_blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    blocks = _blocks(model)
    return [module for name, module in model.named_modules() if not name.startswith(blocks)]


def _linear_in_blocks(model: torch.nn.Module) -> str:
    """The last names of the Linear modules in the blocks, each once."""
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    inside = (name.rpartition(".")[2] for name in linear if name.startswith(_blocks(model)))
    return ", ".join(dict.fromkeys(inside)) or "none"


def build(settings: Settings, groups: ParameterGroups) -> torch.optim.Optimizer:
    """Build the optimizer over a model's groups.

    Raises:
        SettingError: the optimizer refuses these groups.
    """
    kind = settings.optimizer.kind
    try:
        optimizer = _frugal(settings, groups) if kind == "frugal" else _other(settings, groups)
    except ValueError as error:
        raise SettingError(f"optimizer: {error}") from error
    if kind != "frugal" and getattr(settings.model, "dtype", None) == "bfloat16":
        what = f"optimizer.kind={kind} rounds weights and moments in bfloat16 to the nearest, which"
        warnings.warn(f"{what} loses every update under about 1/512 of a weight; Frugal can do better", stacklevel=2)
    return optimizer


def _frugal(settings: Settings, groups: ParameterGroups) -> Frugal:
    given = asdict(settings.optimizer)
    for name in ("kind", "modules", "rank", "fit_gib", "fit_card_gib"):  # the last three have become the density
        del given[name]
    for name in ("density", "interval"):
        given[name] = with_run_length(given[name], settings.trainer.steps)
    return Frugal(groups, **given, seed=settings.seed)


def _other(settings: Settings, groups: ParameterGroups) -> torch.optim.Optimizer:
    """All optimizers outside FRUGAL's family; AdamW for LoRA too."""
    o, scaled = settings.optimizer, [dict(group) for group in groups]
    if o.kind == "adafactor":
        rates = {"lr": o.lr, "beta2_decay": o.beta2_decay, "d": o.clip, "weight_decay": o.weight_decay}
        return torch.optim.Adafactor(scaled, **rates)
    for group in scaled:
        if group["split"] and o.split_lr_scale != 1:  # as in FRUGAL, lr × weight decay does not change
            decay = group.get("weight_decay", o.weight_decay) / o.split_lr_scale
            group |= {"lr": o.lr * o.split_lr_scale, "weight_decay": decay}
    rates = {"lr": o.lr, "betas": tuple(o.betas), "eps": o.eps, "weight_decay": o.weight_decay}
    if o.kind == "adamw_8bit":
        from torchao.optim import AdamW8bit

        plain = [{**group, "params": [param for _, param in group["params"]]} for group in scaled]
        return AdamW8bit(plain, **rates, block_size=o.block_size)
    if o.kind in ("adamw", "lora"):
        return torch.optim.AdamW(scaled, **rates, fused=True)
    theirs = (True, False)  # `dim` is of SCALE, which has the embeddings and the head, too
    matrices, others = ([g for g in scaled if (g["split"] or "dim" in g) is mine] for mine in theirs)
    of_matrices = _of_matrices(settings, matrices, rates)
    return Several(of_matrices, torch.optim.AdamW(others, **rates, fused=True)) if others else of_matrices


def _of_matrices(settings: Settings, matrices: list[dict[str, Any]], rates: Mapping[str, Any]) -> torch.optim.Optimizer:
    """Optimizers that take only matrices."""
    o = settings.optimizer
    if o.kind == "muon":
        return torch.optim.Muon(
            matrices, lr=o.lr, weight_decay=o.weight_decay, momentum=o.momentum, nesterov=o.nesterov,
            ns_steps=o.ns_steps, adjust_lr_fn="match_rms_adamw",
        )  # fmt: skip
    if o.kind == "scale":
        return Scale(matrices, lr=o.lr, weight_decay=o.weight_decay)
    low_rank = {"rank": o.rank, "interval": o.interval, "growth": o.growth, "seed": settings.seed}
    if o.kind == "apollo":
        return Apollo(matrices, **rates, **low_rank, scaling=o.scaling)
    return Fira(matrices, **rates, **low_rank, alpha=o.alpha)
