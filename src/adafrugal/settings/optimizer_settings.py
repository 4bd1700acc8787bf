"""The settings of optimizers. Names and ranges of FRUGAL's family come from `adafrugal.optim.choices`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from adafrugal.optim import choices, controls
from adafrugal.optim.choices import (
    NAMES,
    OF_BASELINES,
    ON_SHARDS,
    POLICIES,
    RANGES,
    SCALINGS,
    STATE_FREE,
    SUBSPACES,
    TREATMENTS,
)
from adafrugal.settings.canonical import OF_SIZE, density_of_rank, described, run_steps, spelled, with_run_length
from adafrugal.settings.explain import nearest
from adafrugal.settings.ranges import Part, above, at_least, is_number, one_of, ranged, refusal, within
from adafrugal.system.errors import SettingError

if TYPE_CHECKING:
    from adafrugal.settings.schema import Settings

BUDGETS = ("fit_gib", "fit_card_gib")
_Kinds = Mapping[str, Mapping[str, tuple[Any, ...]]]  # of `choices`
_LARGEST = 1 << 20  # rank: above any model's hidden size


def _as_in_optim(name: str, default: Any) -> Any:
    words, holds = (RANGES | OF_BASELINES)[name]
    return ranged(default, holds, words)


def _are_factors(scales: Any) -> bool:
    return isinstance(scales, dict) and all(is_number(scale) and scale > 0 for scale in scales.values())


class OptimizerSettings(Part, path="optimizer"):
    """An optimizer."""

    def check(self, s: Settings) -> None:
        """Refuse fsdp for optimizers other than AdamW and FRUGAL's family, which need whole matrices."""
        able = "adamw, or one of FRUGAL's family, with trainer.parallel=fsdp: others need whole matrices; ddp takes all"
        self.need(s.trainer.parallel != "fsdp" or self.kind in ("adamw", "frugal"), "kind", able)


@dataclass
class AdamWSettings(OptimizerSettings):
    """torch.optim.AdamW."""

    kind: str = "adamw"
    lr: float = _as_in_optim("lr", 1e-3)
    betas: list[float] = _as_in_optim("betas", [0.9, 0.999])
    eps: float = _as_in_optim("eps", 1e-8)
    weight_decay: float = _as_in_optim("weight_decay", 0.0)
    split_lr_scale: float = above(0, 1.0, "; optimizer=frugal takes 0, too")  # of lr, for Linear weights in the blocks


@dataclass
class ModuleSettings(Part, path="optimizer.modules"):
    """Treatment of modules outside FRUGAL's split: state_full, split, state_free (permanently) or frozen."""

    embeddings: str = one_of(*TREATMENTS)
    norms: str = one_of(*TREATMENTS)
    head: str = one_of(*TREATMENTS)
    # patterns for the names of Linear in the blocks to split; null: all
    split: list[str] | None = ranged(None, bool, "names of modules, such as ['*.query', '*.value'], or null for all")
    unsplit: str = ranged("state_free", TREATMENTS.__contains__, TREATMENTS)  # the other Linear in the blocks
    # patterns for the names of Linear in the blocks -> factor on ρ
    density_scale: Any = ranged(None, _are_factors, "names of modules, each with a factor above 0: {*.down_proj:1.5}")

    def check(self, s: Settings) -> None:
        """Refuse frozen modules with DDP, which waits for every gradient."""
        other = "another with trainer.parallel=ddp, which waits for every gradient; or trainer.parallel=fsdp"
        for name in ("embeddings", "norms", "head", "unsplit"):
            self.need(s.trainer.parallel != "ddp" or getattr(self, name) != "frozen", name, other)

    def canonical(self, s: Settings) -> None:
        """Write factors as floats."""
        scales = self.density_scale or {}
        self.density_scale = {str(name): float(scale) for name, scale in scales.items()} or None


@dataclass
class FrugalSettings(AdamWSettings):
    """adafrugal.optim.Frugal, which documents the settings without a comment here."""

    kind: str = "frugal"
    split_lr_scale: float = _as_in_optim("split_lr_scale", 1.0)
    density: Any = 0.25
    fit_gib: float | None = above(0, None, " GiB of memory, or null")  # lower the initial ρ if the estimate is above
    fit_card_gib: float | None = above(0, None, " GiB of memory, or null")  # likewise, of all that the card must have
    rank: Any = None  # instead of the density: a number of columns of the model's hidden size
    interval: Any = 200
    subspace: Any = "blocks"
    state_full: str = one_of(*NAMES["state_full"])
    state_free: Any = "signsgd"
    state_free_lr_scale: float = _as_in_optim("state_free_lr_scale", 1.0)
    on_refresh: str = one_of(*NAMES["on_refresh"])
    shrink: str = one_of(*NAMES["shrink"])
    stagger: int = _as_in_optim("stagger", 1)
    state_dtype: str | None = one_of(*NAMES["state_dtype"])
    state_on: str = one_of(*NAMES["state_on"])
    stochastic_rounding: bool = False
    nonfinite: str | None = one_of(*NAMES["nonfinite"])
    modules: ModuleSettings = field(default_factory=ModuleSettings)
    fused: bool = True
    compile: bool | None = None  # null: for large models on a CPU

    def __post_init__(self) -> None:
        """Move `density.fit_gib` and `density.fit_card_gib`, other names of both, out of the control's settings."""
        if isinstance(self.density, dict):
            self.density = dict(self.density)
            for name in BUDGETS:
                given, own = self.density.pop(name, None), getattr(self, name)
                if None not in (given, own) and given != own:
                    twice = f"optimizer.{name} is {own} and optimizer.density.{name} is {given}"
                    raise SettingError(f"{twice}, which are two names of one setting; give one of them")
                setattr(self, name, own if given is None else given)

    def check(self, s: Settings) -> None:
        """Require valid controls and subspaces that go with the other settings."""
        steps, is_sharded = run_steps(s), s.trainer.parallel == "fsdp"
        self._check_controls(steps)
        kind, own = self._checked("subspace", SUBSPACES)
        self.need(self.on_refresh in POLICIES[kind], "on_refresh", f"{', '.join(POLICIES[kind])} with {kind}")
        self._check_rule()
        on_shards = f"{ON_SHARDS} with trainer.parallel=fsdp, which divides matrices by rows; ddp takes all"
        self.need(not is_sharded or choices.works_on_shards(kind, own), "subspace", on_shards)
        on_device = "device with trainer.parallel=fsdp; there trainer.offload moves the state to the CPU"
        self.need(not is_sharded or self.state_on == "device", "state_on", on_device)
        interval = controls.interval(with_run_length(self.interval, steps))
        words = choices.allowed_stagger(self.stagger, kind, interval)
        self.need(words is None, "stagger", words or "")
        if kind == "blocks":
            self._check_blocks(own, s)
        elif self.modules.norms == "split":
            self.modules.need(False, "norms", f"others with {kind}, which splits only matrices; blocks split all")
        self._check_budgets(s)

    def _check_budgets(self, s: Settings) -> None:
        if None not in (self.fit_gib, self.fit_card_gib):
            both = f"optimizer.fit_gib is {self.fit_gib:g} and optimizer.fit_card_gib is {self.fit_card_gib:g}"
            raise SettingError(f"{both}: the first counts tensors alone, the second the whole card; set one to null")
        for name in BUDGETS:
            fits = getattr(self, name) is not None
            has_start = {"start", "value"} & described(self.density).keys()
            self.need(not fits or bool(has_start), name, "null with a density of your own that has no start")
            self.need(not (fits and s.trainer.offload), name, "null with trainer.offload=true, which is not estimated")

    def _check_controls(self, steps: int) -> None:
        given, rank = {"density": self.density, "interval": self.interval}, self.rank
        if rank is None:
            some = "a share from 0 to 1, or a control such as optimizer/density=linear; or give optimizer.rank"
            self.need(self.density is not None, "density", some)
        elif self.density is not None:
            both = f"optimizer.rank is {rank} and optimizer.density is {self.density}"
            raise SettingError(f"{both}: each says how much is selected; set one to null")
        else:
            sizes = [v for key, v in described(rank).items() if key in OF_SIZE]
            possible = all(is_number(size) and 0 <= size <= _LARGEST for size in sizes)
            self.need(possible, "rank", "a number of columns, 0 or more, or a control of such numbers")
            given = {"rank": density_of_rank(rank, _LARGEST), "interval": self.interval}
        paces = {}
        for name, control in given.items():
            try:
                made = (controls.interval if name == "interval" else controls.density)(with_run_length(control, steps))
                if getattr(made, "every", None) is not None:
                    paces[name] = f"every {made.every} steps, {getattr(made, 'source', 'validation')}"
            except ValueError as error:
                hint = f"; to choose another kind write optimizer/{name}=…" if " has no " in str(error) else ""
                raise SettingError(f"optimizer.{name}: {error}{hint}") from None

        if len(set(paces.values())) > 1:
            both = " and ".join(f"optimizer.{name} observes a loss {pace}" for name, pace in paces.items())
            raise SettingError(f"{both}; allowed: one every and one source for both")

    def _checked(self, name: str, kinds: _Kinds) -> tuple[str, dict[str, Any]]:
        """Return the kind and the own settings of a part that is one of `kinds`."""
        kind, own = choices.described(getattr(self, name))
        if kind not in tuple(kinds):
            raise SettingError(refusal(f"optimizer.{name}", kind, kinds))
        for key, value in own.items():
            if key not in kinds[kind]:
                raise SettingError(f"optimizer.{name}.{key}: no such setting; {nearest(key, kinds[kind])}")
            if words := choices.allowed_setting(name, kind, key, value):
                names = [each for each in kinds[kind][key] if isinstance(each, str)]
                raise SettingError(refusal(f"optimizer.{name}.{key}", value, names or words))
        if kind in choices.OWN[name]:
            try:
                choices.OWN[name][kind](**own)
            except (TypeError, ValueError) as error:
                raise SettingError(f"optimizer.{name}: {error}") from error
        return kind, own

    def _check_rule(self) -> None:
        kind, _ = self._checked("state_free", STATE_FREE)
        sees, norms = choices.SEEN_BY[kind], self.modules.norms
        of_vectors = f"state_full or frozen with optimizer.state_free={kind}, which updates only matrices"
        self.modules.need(choices.goes_by_entry(sees) or norms in ("state_full", "frozen"), "norms", of_vectors)

    def _check_blocks(self, own: dict[str, str], s: Settings) -> None:
        self.need(self.rank is None, "rank", "null with blocks, which are whole matrices; columns take ranks")
        by_layer, modules = own.get("unit") == "layer", self.modules
        if by_layer and "split" in (modules.embeddings, modules.norms, modules.head):
            raise SettingError("optimizer.modules: with blocks of unit layer nothing outside the layers can be split")
        if s.model.kind == "llama" and self.state_free == "none" and own.get("match", "count") == "count":
            layers = s.model.num_hidden_layers
            first = float(controls.density(with_run_length(self.density, run_steps(s))).at(0))
            selected = int(first * layers) if by_layer else round(first * 7 * layers)
            blocks = f"{layers} layers" if by_layer else f"{7 * layers} matrices"
            some = f"one that selects at least one of the {blocks}, since optimizer.state_free=none trains no other"
            self.need(selected > 0, "density", some)

    def canonical(self, s: Settings) -> None:
        """Write controls in canonical form, and a subspace or a rule with its defaults as its name."""
        self.state_dtype = None if self.state_dtype == "float32" else self.state_dtype
        chosen = "density" if self.rank is None else "rank"
        setattr(self, chosen, spelled(getattr(self, chosen), controls.DENSITIES, s))
        self.interval = spelled(self.interval, controls.INTERVALS, s)
        self.subspace = _briefly(self.subspace, SUBSPACES)
        self.state_free = _briefly(self.state_free, STATE_FREE)


def _briefly(part: Any, kinds: _Kinds) -> Any:
    """Return a part as its name, or as a mapping of its kind and the settings that are not defaults."""
    kind, own = choices.described(part)
    different = {key: value for key, value in own.items() if value != kinds[kind][key][0]}
    return {"kind": kind} | different if different else kind


@dataclass
class AdafactorSettings(OptimizerSettings):
    """torch.optim.Adafactor; `lr` is its maximal relative step, `clip` its d."""

    kind: str = "adafactor"
    lr: float = _as_in_optim("lr", 1e-2)
    beta2_decay: float = within(-1, 0, -0.8)
    clip: float = at_least(1, 1.0)
    weight_decay: float = _as_in_optim("weight_decay", 0.0)


@dataclass
class MuonSettings(AdamWSettings):
    """torch.optim.Muon on the split matrices, at a rate adjusted to AdamW's, and fused AdamW elsewhere."""

    kind: str = "muon"
    momentum: float = _as_in_optim("momentum", 0.95)
    nesterov: bool = True
    ns_steps: int = within(1, 99, 5)


@dataclass
class ScaleSettings(AdamWSettings):
    """SCALE on the split matrices, on embeddings and, with a momentum, on the head; fused AdamW elsewhere."""

    kind: str = "scale"
    momentum: float = _as_in_optim("momentum", 0.9)


@dataclass
class LowRankSettings(AdamWSettings):
    """What APOLLO and Fira share; `split_lr_scale` is the place for APOLLO's α."""

    rank: int | float = _as_in_optim("rank", 0.25)
    interval: int = _as_in_optim("interval", 200)  # from one basis to the next
    growth: float = _as_in_optim("growth", 1.01)  # the limit of a norm's growth from step to step


@dataclass
class ApolloSettings(LowRankSettings):
    """APOLLO on the split matrices, and fused AdamW elsewhere; rank 1 with a factor by tensor is APOLLO-Mini."""

    kind: str = "apollo"
    scaling: str = one_of(*SCALINGS)  # what has one factor


@dataclass
class FiraSettings(LowRankSettings):
    """Fira on the split matrices, and fused AdamW elsewhere."""

    kind: str = "fira"
    alpha: float = _as_in_optim("alpha", 1.0)  # weight of the projection beside the rest of the gradient


@dataclass
class AdamW8bitSettings(AdamWSettings):
    """torchao.optim.AdamW8bit."""

    package: ClassVar[str | None] = "torchao"
    kind: str = "adamw_8bit"
    block_size: int = at_least(1, 256)


@dataclass
class LoraSettings(AdamWSettings):
    """LoRA with peft: AdamW on low-rank adapters and the head; all other weights are frozen."""

    package: ClassVar[str | None] = "peft"
    kind: str = "lora"
    split_lr_scale: float = ranged(1.0, lambda scale: scale == 1, "1, since optimizer.alpha scales adapters")
    rank: int = at_least(1, 8)
    alpha: float = above(0, 8.0)  # the adapters' product is scaled by alpha ÷ rank
    dropout: float = ranged(0.0, lambda share: 0 <= share < 1, "a share from 0 to below 1")
    targets: list[str] = ranged([], bool, "names of modules, such as [query, value]")  # modules with adapters

    def check(self, s: Settings) -> None:
        """Require fine-tuning, since adapters are added to trained weights."""
        trained = "an optimizer that trains all weights, since these are random; or task=finetune"
        self.need(s.task.kind == "finetune", "kind", trained)
