"""Which parameters of a model are split, always state-full, permanently state-free or frozen; decayed or not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import Tensor, nn

from adafrugal.optim.choices import TREATMENTS


class _Found(NamedTuple):
    """One tensor of a model, in one of the modules that use it."""

    param: nn.Parameter
    module: nn.Module
    path: str  # of the module
    layer: int | None  # the number of the transformer block among all of the model's; None outside


@dataclass(frozen=True)
class Rule:
    """How tensors are treated for which all given conditions hold.

    Args:
        name: what the table of groups calls them.
        treatment: "split", "state_full", "state_free" (permanently) or "frozen" (`requires_grad` is set to False).
        types: of the module that owns the tensor: classes, or patterns for names of classes (`"*Norm"` also finds
            transformers' `LlamaRMSNorm`, which is no subclass of torch's).
        path: a pattern for the module's path, part by part between the dots: `*` is one part or, at the beginning, any
            number; in a part, `*` and `?` are as in file names; `|` separates alternatives: `*.query|*.q`.
        in_blocks: whether the module is in a transformer block, a member of a `nn.ModuleList`.
        tensors: "matrices" (two dimensions or more), "vectors" (fewer) or "all".
        decayed: whether weight decay applies; None: to matrices, not to vectors.
        optional: whether the rule may hold for no tensor.
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

    def holds(self, found: _Found) -> bool:
        """Whether all of the rule's conditions hold for a tensor."""
        module, name = found.module, type(found.module).__name__
        return (
            any(isinstance(module, kind) if isinstance(kind, type) else fnmatchcase(name, kind) for kind in self.types)
            and self.in_blocks in (None, found.layer is not None)
            and self.tensors in ("all", "matrices" if found.param.ndim > 1 else "vectors")
            and any(_matches(found.path, pattern) for pattern in self.path.split("|"))
        )

    def decays(self, param: Tensor) -> bool:
        """Whether weight decay applies to a tensor that falls under the rule."""
        return param.ndim > 1 if self.decayed is None else self.decayed


def _matches(path: str, pattern: str) -> bool:
    """Whether a dotted path follows a pattern, so that `layers.1` is not taken for the beginning of `layers.10`."""
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
) -> list[Rule]:
    """FRUGAL's rules: Linear weights in the transformer blocks are split, everything else keeps state.

    FRUGAL's claim that the head needs state, and embeddings and norms hardly do, is tested with the first three
    arguments. Its fine-tuning of encoders has `embeddings="frozen", split=["*.query", "*.value"]`.

    Args:
        embeddings: how every `nn.Embedding` is treated; where they are frozen, so are norms in a module `embeddings`.
        norms: every module whose class is called a Norm.
        head: the weight of every `nn.Linear` outside the blocks.
        split: which Linear weights in the blocks are split, as patterns for `Rule.path`; None: all.
        unsplit: how the other Linear weights in the blocks are treated, where `split` says which are.
    """
    linear = {"types": (nn.Linear,), "in_blocks": True, "tensors": "matrices"}
    rules = [Rule(pattern.replace("*.", ""), "split", path=pattern, **linear) for pattern in split or ()]
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
    """Parameter groups for an optimizer; `str()` of it is a table of them, with the float32 state AdamW would keep.

    Each group holds `params` as (name, parameter) pairs, `split`, the `rule` that made it, the `layers` of split
    parameters where they are known, and `weight_decay` 0 where it is not to be decayed. Rates and controls can be
    added to a group. `Frugal` copies them; torch's optimizers write into them. `frozen` lists the name and number of
    entries of each parameter that the rules froze, which is in no group.
    """

    def __init__(self, groups: Any = (), frozen: Sequence[tuple[str, int]] = ()) -> None:
        super().__init__(groups)
        self.frozen = list(frozen)

    def counts(self) -> list[tuple[str, str, int, int]]:
        """One row a group: rule, treatment, number of tensors, number of entries; what is frozen comes last."""
        rows = []
        for group in self:
            params = [p[1] if isinstance(p, tuple) else p for p in group["params"]]  # torch takes the pairs apart
            kind = "state-full" if not group["split"] else "state-free" if group.get("density") == 0.0 else "split"
            rows.append((group["rule"], kind, len(params), sum(p.numel() for p in params)))
        if self.frozen:
            rows.append(("frozen", "frozen", len(self.frozen), sum(entries for _, entries in self.frozen)))
        return rows

    def __str__(self) -> str:
        head = ("group", "kind", "tensors", "parameters", "as AdamW, bytes")
        counts = self.counts()
        state = [0 if kind in ("frozen", "state-free") else 8 * entries for _, kind, _, entries in counts]
        rows = [(rule, kind, f"{n:,}", f"{m:,}", f"{b:,}") for (rule, kind, n, m), b in zip(counts, state, strict=True)]
        tensors, entries = (sum(row[place] for row in counts) for place in (2, 3))
        table = [head, *rows, ("all", "", f"{tensors:,}", f"{entries:,}", f"{sum(state):,}")]
        widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
        aligned = (str.ljust, str.ljust, str.rjust, str.rjust, str.rjust)
        return "\n".join(
            "  ".join(align(cell, w) for align, cell, w in zip(aligned, row, widths, strict=True)) for row in table
        )


def split_parameters(model: nn.Module, rules: Sequence[Rule] | None = None) -> ParameterGroups:
    """Parameter groups of a model by rules, of which the first that holds decides.

    A tensor that is used twice is in one group. Where its places fall under different rules, the one that keeps most
    decides: state-full before split, before state-free, before frozen; so a tied embedding is not split. Tensors that
    do not require gradients are in no group. A rule gives up to two groups: tensors with and without decay.

    Args:
        model: its transformer blocks are the members of its `nn.ModuleList`s.
        rules: None: `default_rules()`. Rules of your own must cover every trainable tensor; `Rule("others",
            "state_full")` at their end does.

    Raises:
        ValueError: a rule under which nothing falls, or a trainable tensor that falls under none.
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
            "nn.Linear in a member of an nn.ModuleList. Give rules of your own, or make the groups yourself: "
            "[{'params': matrices, 'split': True}, {'params': the_others}]"
        )
    frozen = [(name, param) for name, param, number, _ in ordered if rules[number].treatment == "frozen"]
    for _, param in frozen:
        param.requires_grad_(False)
    return ParameterGroups(groups, [(name, param.numel()) for name, param in frozen])


def _assign(model: nn.Module, rules: list[Rule]) -> tuple[dict[Tensor, tuple[int, int | None]], set[int]]:
    """The number of each tensor's rule, with the layer where it applies; and the numbers of all rules that apply."""
    ruled: dict[Tensor, tuple[int, int | None]] = {}
    used: set[int] = set()
    for found in _tensors(model):
        param = found.param
        number = next((i for i, rule in enumerate(rules) if rule.holds(found)), None)
        if number is None:
            if param.requires_grad:
                name = next(name for name, other in model.named_parameters() if other is param)
                raise ValueError(
                    f"{name} {tuple(param.shape)} in a {type(found.module).__name__} falls under no rule; add one, "
                    "such as Rule('others', 'state_full') at the end"
                )
            continue
        if param.requires_grad or rules[number].treatment == "frozen":
            used.add(number)
        rank = TREATMENTS.index(rules[number].treatment)
        if param not in ruled or rank < TREATMENTS.index(rules[ruled[param][0]].treatment):
            ruled[param] = number, found.layer
    return ruled, used


def _collect(rules: list[Rule], tensors: list[tuple[str, nn.Parameter, int, int | None]]) -> list[dict[str, Any]]:
    """The groups of (name, tensor, number of its rule, layer).

    All that is split alike, by however many rules, is one group in the model's order: blocks take turns within a group.
    """
    members: dict[tuple[Any, ...], list[tuple[str, nn.Parameter, int, int | None]]] = {}
    for each in tensors:
        rule = rules[each[2]]
        alike = "split" if rule.treatment == "split" else each[2]
        members.setdefault((alike, rule.decays(each[1]), repr(sorted(rule.settings.items()))), []).append(each)
    groups = []
    for key in sorted(members, key=lambda key: (min(number for _, _, number, _ in members[key]), not key[1])):
        names, params, numbers, layers = zip(*members[key], strict=True)
        rule = rules[numbers[0]]
        group = {"rule": ", ".join(dict.fromkeys(rules[number].name for number in numbers))}
        group |= {"split": rule.treatment in ("split", "state_free"), "params": list(zip(names, params, strict=True))}
        if rule.treatment == "state_free":
            group["density"] = 0.0
        if rule.treatment == "split" and None not in layers:
            group["layers"] = list(layers)
        if not key[1]:
            group["weight_decay"] = 0.0
        groups.append(group | rule.settings)
    return groups


def _tensors(model: nn.Module) -> Iterator[_Found]:
    """Every parameter at every place where it is used, in the model's order."""
    blocks = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    numbers: dict[str, int] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        outermost = min((block for block in blocks if path.startswith(f"{block}.")), key=len, default=None)
        layer = None
        if outermost is not None:
            member = ".".join(path.split(".")[: outermost.count(".") + 2])
            layer = numbers.setdefault(member, len(numbers))
        for param in module.parameters(recurse=False):
            yield _Found(param, module, path, layer)
