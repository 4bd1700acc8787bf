"""Which parameter of a model is split between the two rules, and which always keeps AdamW state; decayed or not."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class ParameterGroups(list[dict[str, Any]]):
    """Parameter groups for an optimizer; `str()` of it is a table of them, with the float32 state AdamW would keep.

    Each group holds `params` as (name, parameter) pairs, `split`, the `rule` that made it, and its own
    `weight_decay` where that is not the optimizer's. Groups may be given rates and controls of their own before an
    optimizer is made of them. `Frugal` copies them; torch's optimizers write into them.
    """

    def counts(self) -> list[tuple[str, str, int, int]]:
        """One row a group: rule, "split" or "state-full", number of tensors, number of entries."""
        rows = []
        for group in self:
            params = [p[1] if isinstance(p, tuple) else p for p in group["params"]]  # torch takes the pairs apart
            kind = "split" if group["split"] else "state-full"
            rows.append((group["rule"], kind, len(params), sum(p.numel() for p in params)))
        return rows

    def __str__(self) -> str:
        head = ("group", "kind", "tensors", "parameters", "as AdamW, bytes")
        rows = [(rule, kind, f"{n:,}", f"{entries:,}", f"{8 * entries:,}") for rule, kind, n, entries in self.counts()]
        entries = sum(row[3] for row in self.counts())
        tensors = sum(row[2] for row in self.counts())
        table = [head, *rows, ("all", "", f"{tensors:,}", f"{entries:,}", f"{8 * entries:,}")]
        widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
        aligned = (str.ljust, str.ljust, str.rjust, str.rjust, str.rjust)
        return "\n".join(
            "  ".join(align(cell, w) for align, cell, w in zip(aligned, row, widths, strict=True)) for row in table
        )


def split_parameters(model: nn.Module) -> ParameterGroups:
    """The groups of FRUGAL's papers: what is split, and what always keeps state.

    Split are the weights of every `nn.Linear` inside the transformer blocks, by module and type: the blocks are the
    members of the model's `nn.ModuleList`s. Always state-full are all other trainable tensors: embeddings, head,
    norms, biases. Tensors of fewer than two dimensions are never decayed. A tensor used twice is counted once, and
    one that is shared with a module outside the blocks (a tied embedding) is not split.

    Raises:
        ValueError: no trainable `nn.Linear` lies inside a `nn.ModuleList`.
    """
    split_ids, outside_ids = set(), set()
    block_names = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{block}.") for block in block_names)
        for key, param in module.named_parameters(recurse=False):
            is_matrix = inside and isinstance(module, nn.Linear) and key == "weight"
            (split_ids if is_matrix else outside_ids).add(id(param))
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    kinds: dict[str, list[tuple[str, Tensor]]] = {"split": [], "state-full": [], "undecayed": []}
    for name, param in trainable:
        if id(param) in split_ids - outside_ids:
            kinds["split"].append((name, param))
        else:
            kinds["state-full" if param.ndim > 1 else "undecayed"].append((name, param))
    if not kinds["split"]:
        raise ValueError(
            f"nothing to split in {type(model).__name__}: no trainable nn.Linear lies inside an nn.ModuleList. "
            "Make the groups yourself: [{'params': matrices, 'split': True}, {'params': the_others}]"
        )
    groups = (
        {"rule": "Linear in blocks", "split": True, "params": kinds["split"]},
        {"rule": "other matrices", "split": False, "params": kinds["state-full"]},
        {"rule": "vectors, scalars", "split": False, "params": kinds["undecayed"], "weight_decay": 0.0},
    )
    return ParameterGroups(group for group in groups if group["params"])
