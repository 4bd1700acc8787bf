"""From the settings to parameter groups and an optimizer, for every file of conf/optimizer."""

from __future__ import annotations

import warnings
from dataclasses import asdict, replace
from typing import Any

import torch

from adafrugal.optim import Frugal, ParameterGroups, Several, default_rules, split_parameters
from adafrugal.settings.canonical import with_run_length
from adafrugal.settings.schema import LoraSettings, Settings
from adafrugal.system.errors import SettingError


def groups(settings: Settings, model: torch.nn.Module) -> ParameterGroups:
    """A model's parameter groups as the settings want them."""
    modules, is_lora = getattr(settings.optimizer, "modules", None), isinstance(settings.optimizer, LoraSettings)
    rules = default_rules(**asdict(modules)) if modules else default_rules()
    if is_lora:  # they are all that is left to train in the blocks
        rules = [replace(rule, name="adapters") if rule.treatment == "split" else rule for rule in rules]
    try:
        found = split_parameters(model, rules)
        if is_lora:
            found.frozen = [(name, p.numel()) for name, p in model.named_parameters() if not p.requires_grad]
        return found
    except ValueError as error:  # a pattern under which nothing falls, or nothing to split
        names = ", ".join(_linear_in_blocks(model)) or "none"
        here = f"the Linear modules in the blocks of {type(model).__name__} are called {names}"
        raise SettingError(f"optimizer.modules.split: {error}; {here}") from error


def _linear_in_blocks(model: torch.nn.Module) -> list[str]:
    """Their names, without those of the modules that hold them."""
    blocks = _blocks(model)
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return list(dict.fromkeys(name.rpartition(".")[2] for name in linear if name.startswith(blocks)))


def _blocks(model: torch.nn.Module) -> tuple[str, ...]:
    """What the names of all that is in a transformer block begin with."""
    return tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList))


def adapt(settings: Settings, model: torch.nn.Module) -> None:
    """Put into a pretrained model what the optimizer trains instead of it; only LoRA does.

    LoRA's adapters and the Linear weights and biases outside the blocks are left trainable: these are the head, and
    FRUGAL's arms train them, too.

    Raises:
        SettingError: nothing in the model is called so.
    """
    o = settings.optimizer
    if not isinstance(o, LoraSettings):
        return
    import peft

    blocks = _blocks(model)
    outside = [module for name, module in model.named_modules() if not name.startswith(blocks)]
    head = [param for module in outside if isinstance(module, torch.nn.Linear) for param in module.parameters()]
    adapters = peft.LoraConfig(r=o.rank, lora_alpha=o.alpha, lora_dropout=o.dropout, target_modules=list(o.targets))
    try:
        peft.inject_adapter_in_model(adapters, model)
    except ValueError as error:
        names = ", ".join(_linear_in_blocks(model))
        raise SettingError(f"optimizer.targets is {list(o.targets)}: {error} Linear in its blocks: {names}") from error
    for param in head:
        param.requires_grad_(True)


def build(settings: Settings, groups: ParameterGroups) -> torch.optim.Optimizer:
    """The optimizer that the settings describe, over a model's groups.

    Raises:
        SettingError: the optimizer refuses these groups.
    """
    try:
        optimizer = _BUILDERS[settings.optimizer.kind](settings, groups)
    except ValueError as error:
        raise SettingError(f"optimizer: {error}") from error
    if not isinstance(optimizer, Frugal) and getattr(settings.model, "dtype", None) == "bfloat16":
        what = f"optimizer.kind={settings.optimizer.kind} rounds weights and moments in bfloat16 to the nearest, which"
        warnings.warn(f"{what} loses every update under about 1/512 of a weight; Frugal can do better", stacklevel=2)
    return optimizer


def _adam_rates(settings: Settings) -> dict[str, Any]:
    o = settings.optimizer
    return {"lr": o.lr, "betas": tuple(o.betas), "eps": o.eps, "weight_decay": o.weight_decay}


def _scaled(settings: Settings, groups: ParameterGroups) -> list[dict[str, Any]]:
    """The groups with the rate of the split matrices in theirs. As FRUGAL has it, their decay is not scaled with it."""
    o, scale = settings.optimizer, settings.optimizer.split_lr_scale
    own = {"lr": o.lr * scale}
    found = []
    for group in groups:
        decay = {"weight_decay": group.get("weight_decay", o.weight_decay) / scale}
        found.append({**group, **own, **decay} if group["split"] and scale != 1 else dict(group))
    return found


def _adamw(settings: Settings, groups: ParameterGroups) -> torch.optim.Optimizer:
    return torch.optim.AdamW(_scaled(settings, groups), **_adam_rates(settings), fused=True)


def _adamw_8bit(settings: Settings, groups: ParameterGroups) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit

    plain = [{**group, "params": [param for _, param in group["params"]]} for group in _scaled(settings, groups)]
    return AdamW8bit(plain, **_adam_rates(settings), block_size=settings.optimizer.block_size)


def _adafactor(settings: Settings, groups: ParameterGroups) -> torch.optim.Optimizer:
    o = settings.optimizer
    rates = {"lr": o.lr, "beta2_decay": o.beta2_decay, "d": o.clip, "weight_decay": o.weight_decay}
    return torch.optim.Adafactor([dict(group) for group in groups], **rates)


def _muon(settings: Settings, groups: ParameterGroups) -> torch.optim.Optimizer:
    o = settings.optimizer
    scaled = _scaled(settings, groups)
    matrices, others = ([group for group in scaled if group["split"] is split] for split in (True, False))
    muon = torch.optim.Muon(
        matrices, lr=o.lr, weight_decay=o.weight_decay, momentum=o.momentum, nesterov=o.nesterov,
        ns_steps=o.ns_steps, adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
    if not others:
        return muon
    return Several(muon, torch.optim.AdamW(others, **_adam_rates(settings), fused=True))


def _frugal(settings: Settings, groups: ParameterGroups) -> torch.optim.Optimizer:
    given = asdict(settings.optimizer)
    del given["kind"], given["modules"], given["rank"], given["fit_gib"]  # which the density was made of
    for name in ("density", "interval"):
        given[name] = with_run_length(given[name], settings.trainer.steps)
    return Frugal(groups, **given, seed=settings.seed)


_BUILDERS = {
    "adamw": _adamw,
    "adamw_8bit": _adamw_8bit,
    "adafactor": _adafactor,
    "muon": _muon,
    "frugal": _frugal,
    "lora": _adamw,
}
