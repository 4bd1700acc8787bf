"""A saved state of the optimizer: whether it is this one's, and what is made of it again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adafrugal.optim.subspaces import Subspace
from adafrugal.optim.subspaces import subspace as as_subspace


def restored_subspace(settings: Mapping[str, Any], old: Subspace) -> Subspace:
    """The subspace of these settings: of the class of the one it replaces, which may be anybody's own, or ours."""
    if settings["kind"] != old.kind:
        return as_subspace(settings)
    return type(old)(**{key: value for key, value in settings.items() if key != "kind"})


def refuse_other(state_dict: Mapping[str, Any], groups: list[dict[str, Any]]) -> None:
    """Refuse a saved state of other groups than these, or of tensors of other shapes."""
    saved = [(group.get("split"), group.get("shapes")) for group in state_dict["param_groups"]]
    ours = [(group["split"], group["shapes"]) for group in groups]
    if saved != ours:
        raise ValueError(
            f"the saved state is not this optimizer's: its groups are {_outline(saved)}, ours {_outline(ours)}; "
            "make the optimizer over the same model's groups before loading"
        )


def _outline(groups: list[tuple[bool | None, list[list[int]] | None]]) -> str:
    return "; ".join(f"{'split' if split else 'not split'}, shapes {shapes}" for split, shapes in groups)
