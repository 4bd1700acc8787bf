"""Group a model's parameters by rules: split, always state-full, permanently state-free or frozen; decayed or not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from adafrugal.optim.choices import TREATMENTS


@dataclass(frozen=True)
class Rule:
    """A treatment of all tensors that meet the given conditions.

    Args:
        name: in the table of groups.
        treatment: "split", "state_full", "state_free" (permanently) or "frozen" (`requires_grad` is set to False).
        types: of the module that owns the tensor: classes, or patterns for names of classes, without or with their
            module (`"*Norm"` also finds transformers' `LlamaRMSNorm`, which is no subclass of torch's;
            `"transformers.pytorch_utils.Conv1D"` finds no other Conv1D).
        path: pattern for the module's path, matched part by part between dots: `*` is one part or, at the beginning,
            any number; within a part, `*` and `?` are as in file names; `|` separates alternatives: `*.query|*.q`.
        in_blocks: whether the module is in a transformer block, a member of a `nn.ModuleList`.
        tensors: "matrices" (two dimensions or more), "vectors" (fewer) or "all".
        decayed: whether weight decay applies; None: to matrices, not to vectors.
        optional: whether the rule may match no tensor.
        settings: for the optimizer's group, such as `{"density": 0.01}` or `{"lr": 1e-4}`.
    """

    name: str
    treatment: str
    types: tuple[type[nn.Module] | str, ...] = (nn.Module,)
    path: str = "*"
    in_blocks: bool | None = None
    tensors: str = "all"
    decayed: bool | None = None
    optional: bool = False
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, allowed in (("treatment", TREATMENTS), ("tensors", ("all", "matrices", "vectors"))):
            if (value := getattr(self, key)) not in allowed:
                raise ValueError(f"rule {self.name!r}: {key} is {value!r}; allowed: {', '.join(allowed)}")

    def holds(self, param: Tensor, module: nn.Module, path: str, layer: int | None) -> bool:
        """Return whether a tensor of the module at `path` meets all conditions; outside blocks `layer` is None."""
        return (
            any(_is_of(module, kind) for kind in self.types)
            and self.in_blocks in (None, layer is not None)
            and self.tensors in ("all", "matrices" if param.ndim > 1 else "vectors")
            and any(_matches(path, pattern) for pattern in self.path.split("|"))
        )


def _is_of(module: nn.Module, kind: type[nn.Module] | str) -> bool:
    """Return whether a module is of a class, or its class's name matches a pattern, without or with the module's."""
    if isinstance(kind, type):
        return isinstance(module, kind)
    name = type(module).__qualname__
    return any(fnmatchcase(called, kind) for called in (name, f"{type(module).__module__}.{name}"))


def _matches(path: str, pattern: str) -> bool:
    """Return whether a dotted path matches a pattern; parts match whole: `layers.1` does not match `layers.10`."""
    parts, wanted = path.split("."), pattern.split(".")
    if wanted[0] == "*":
        wanted = wanted[1:]
        parts = parts[max(0, len(parts) - len(wanted)) :]
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def default_rules(
    *,
    embeddings: str = "state_full",
    norms: str = "state_full",
    head: str = "state_full",
    split: Sequence[str] | None = None,
    unsplit: str = "state_free",
    density_scale: Mapping[str, float] | None = None,
) -> list[Rule]:
    """Return FRUGAL's rules: split Linear weights in the transformer blocks, keep state for all others.

    transformers' Conv1D (GPT-2's Linear) counts as Linear. Its weights are [n_in, n_out], so `subspace="columns"`
    selects its outputs, and "rows" its inputs. Convolutions keep state; `Rule("convolutions", "split", (nn.Conv2d,))`
    before the others splits them, with the subspace "blocks", which takes tensors of any shape.

    The first three arguments test FRUGAL's claim that the head needs state, and embeddings and norms hardly do. Its
    fine-tuning of encoders has `embeddings="frozen", split=["*.query", "*.value"]`.

    Args:
        embeddings: treatment of every `nn.Embedding`; "frozen" also freezes norms in a module `embeddings`.
        norms: treatment of every module whose class name ends in Norm.
        head: treatment of the weight of every `nn.Linear` outside the blocks.
        split: patterns for `Rule.path` of the Linear weights in the blocks to split; None: all.
        unsplit: treatment of the other Linear weights in the blocks, if `split` is given.
        density_scale: the factor on ρ (`Frugal`) of Linear weights in the blocks by pattern for `Rule.path`, such as
            `{"*.q_proj|*.k_proj": 0.5, "*.down_proj": 1.375}`. They are split; the first pattern that holds decides.
    """
    kinds = (nn.Linear, "transformers.pytorch_utils.Conv1D")
    linear: dict[str, Any] = {"types": kinds, "in_blocks": True, "tensors": "matrices"}
    given = [(pattern, {"density_scale": scale}) for pattern, scale in (density_scale or {}).items()]
    given += [(pattern, {}) for pattern in split or ()]
    rules = [Rule(path.replace("*.", ""), "split", path=path, settings=own, **linear) for path, own in given]
    name, treatment = ("Linear in blocks", "split") if split is None else ("other Linear in blocks", unsplit)
    rules.append(Rule(name, treatment, **linear, optional=True))
    if embeddings == "frozen":
        rules.append(Rule("norms of embeddings", "frozen", ("*Norm",), path="*.embeddings.*", optional=True))
    movable = (
        Rule("embeddings", embeddings, (nn.Embedding,)),
        Rule("norms", norms, ("*Norm",)),
        Rule("head", head, (nn.Linear,), in_blocks=False, tensors="matrices"),
    )
    others = (
        Rule("other matrices", "state_full", tensors="matrices", optional=True),
        Rule("vectors, scalars", "state_full", tensors="vectors", optional=True),
    )
    return [*rules, *(rule for rule in movable if rule.treatment != "state_full"), *others]


class ParameterGroups(list[dict[str, Any]]):
    """Parameter groups for an optimizer; `str()` returns a table of them, with the float32 state AdamW would keep.

    Each group holds `params` as (name, parameter) pairs, `split`, the `rule` that made it, the `layers` of split
    parameters if known, and `weight_decay` 0 if it is not decayed. Rates and controls can be added to a group.
    torch's optimizers take pairs, too; for others, such as torchao's, keep the parameters alone:
    `[{**group, "params": [param for _, param in group["params"]]} for group in groups]`.
    `Frugal` copies the groups; torch's optimizers write into them. `frozen` lists the name and number of entries of
    each parameter that the rules froze; these are in no group.
    """

    def __init__(self, groups: Any = (), frozen: Sequence[tuple[str, int]] = ()) -> None:
        super().__init__(groups)
        self.frozen = list(frozen)

    def counts(self) -> list[tuple[str, str, int, int]]:
        """Return a row for each group: rule, treatment, number of tensors, number of entries; frozen tensors last."""
        rows = []
        for group in self:
            params = [p[1] if isinstance(p, tuple) else p for p in group["params"]]  # torch unpacks the pairs
            kind = "state-full" if not group["split"] else "state-free" if group.get("density") == 0.0 else "split"
            rows.append((group["rule"], kind, len(params), sum(p.numel() for p in params)))
        if self.frozen:
            rows.append(("frozen", "frozen", len(self.frozen), sum(entries for _, entries in self.frozen)))
        return rows

    def __str__(self) -> str:
        rows = [(*row, 0 if row[1] in ("frozen", "state-free") else 8 * row[3]) for row in self.counts()]
        rows.append(("all", "", sum(row[2] for row in rows), sum(row[3] for row in rows), sum(row[4] for row in rows)))
        table = [["group", "kind", "tensors", "parameters", "as AdamW, bytes"]]
        table += [[rule, kind, *(f"{number:,}" for number in numbers)] for rule, kind, *numbers in rows]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        cells = (zip(row, "<<>>>", widths, strict=True) for row in table)
        return "\n".join("  ".join(f"{cell:{align}{width}}" for cell, align, width in row) for row in cells)


def split_parameters(model: nn.Module, rules: Sequence[Rule] | None = None) -> ParameterGroups:
    """Group a model's parameters by rules; the first matching rule decides.

    A tensor that is used twice is in one group. If different rules match its uses, the one that keeps most state
    decides: state-full before split, before state-free, before frozen; so a tied embedding is not split. Tensors that
    do not require gradients are in no group. A rule makes up to two groups: tensors with and without decay.

    Args:
        model: its transformer blocks are the members of its `nn.ModuleList`s.
        rules: None: `default_rules()`. Custom rules must cover every trainable tensor; `Rule("others", "state_full")`
            at their end does.

    Raises:
        ValueError: a rule matches no tensor, a trainable tensor matches no rule, or no tensor is split.
    """
    rules = list(default_rules() if rules is None else rules)
    ruled, used = _assign(model, rules)
    for number, rule in enumerate(rules):
        if number not in used and not rule.optional:
            raise ValueError(f"no trainable tensor falls under the rule {rule.name!r}; correct it or leave it out")
    ordered = [(name, param, *ruled[param]) for name, param in model.named_parameters() if param in ruled]
    trained = [each for each in ordered if each[1].requires_grad and rules[each[2]].treatment != "frozen"]
    groups = _collect(rules, trained)
    if not any(group["split"] for group in groups):
        raise ValueError(
            f"nothing to split in {type(model).__name__}: no trainable tensor falls under a rule that says so, such as "
            f"nn.Linear in a member of an nn.ModuleList. {_unsplit(model)}. Give rules of your own, such as "
            "Rule('mine', 'split', ('ClassName',), tensors='matrices') before default_rules(), or make the groups "
            "yourself: [{'params': matrices, 'split': True}, {'params': the_others}]"
        )
    frozen = [(name, param) for name, param, number, _ in ordered if rules[number].treatment == "frozen"]
    for _, param in frozen:
        param.requires_grad_(False)
    return ParameterGroups(groups, [(name, param.numel()) for name, param in frozen])


def _unsplit(model: nn.Module) -> str:
    """Return a sentence about the classes of the modules in a model's blocks that hold trainable matrices."""
    uses = [(use[1], use[3]) for use in _uses(model) if use[0].ndim > 1 and use[0].requires_grad]
    inside = Counter(type(module).__name__ for module, layer in uses if layer is not None)
    found = inside or Counter(type(module).__name__ for module, _ in uses)
    where = "Its blocks hold matrices" if inside else "It has no matrices in blocks, and others"
    listed = ", ".join(f"{name} ({count})" for name, count in found.most_common())
    return f"{where} in {listed}" if found else "It has no trainable matrix"


def _assign(model: nn.Module, rules: list[Rule]) -> tuple[dict[Tensor, tuple[int, int | None]], set[int]]:
    """Return each tensor's rule index, with the layer where that rule applies; and the indices of all rules used."""
    ruled: dict[Tensor, tuple[int, int | None]] = {}
    used: set[int] = set()
    for param, module, path, layer in _uses(model):
        number = next((i for i, rule in enumerate(rules) if rule.holds(param, module, path, layer)), None)
        if number is None:
            if param.requires_grad:
                name = next(name for name, other in model.named_parameters() if other is param)
                raise ValueError(
                    f"{name} {tuple(param.shape)} in a {type(module).__name__} falls under no rule; add one, "
                    "such as Rule('others', 'state_full') at the end"
                )
            continue
        if param.requires_grad or rules[number].treatment == "frozen":
            used.add(number)
        rank = TREATMENTS.index(rules[number].treatment)
        if param not in ruled or rank < TREATMENTS.index(rules[ruled[param][0]].treatment):
            ruled[param] = number, layer
    return ruled, used


def _collect(rules: list[Rule], tensors: list[tuple[str, nn.Parameter, int, int | None]]) -> list[dict[str, Any]]:
    """Collect (name, tensor, rule index, layer) into groups.

    Tensors split alike, by any number of rules, form one group in the model's order: blocks take turns within a group.
    """
    members: dict[tuple[Any, ...], list[tuple[str, nn.Parameter, int, int | None]]] = {}
    for each in tensors:
        rule = rules[each[2]]
        alike = "split" if rule.treatment == "split" else each[2]
        decayed = each[1].ndim > 1 if rule.decayed is None else rule.decayed
        members.setdefault((alike, decayed, repr(sorted(rule.settings.items()))), []).append(each)
    groups = []
    for key in sorted(members, key=lambda key: (min(number for _, _, number, _ in members[key]), not key[1])):
        names, params, numbers, layers = zip(*members[key], strict=True)
        rule = rules[numbers[0]]
        group: dict[str, Any] = {"rule": ", ".join(dict.fromkeys(rules[number].name for number in numbers))}
        group |= {"split": rule.treatment in ("split", "state_free"), "params": list(zip(names, params, strict=True))}
        if rule.treatment == "state_free":
            group["density"] = 0.0
        if rule.treatment == "split" and None not in layers:
            group["layers"] = list(layers)
        if not key[1]:
            group["weight_decay"] = 0.0
        groups.append(group | rule.settings)
    return groups


def _uses(model: nn.Module) -> Iterator[tuple[nn.Parameter, nn.Module, str, int | None]]:
    """Yield each parameter with each module that uses it, the module's path, and the index of its transformer block."""
    blocks = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    numbers: dict[str, int] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        outermost = min((block for block in blocks if path.startswith(f"{block}.")), key=len, default=None)
        layer = None
        if outermost is not None:
            member = ".".join(path.split(".")[: outermost.count(".") + 2])
            layer = numbers.setdefault(member, len(numbers))
        for param in module.parameters(recurse=False):
            yield param, module, path, layer
