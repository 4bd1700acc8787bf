"""The FRUGAL family of optimizers: AdamW state for a share ρ of each matrix's entries, signSGD for the rest.

Needs torch and nothing else of this project. Names are imported at first use, so that `choices` and `controls` can be
imported without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adafrugal.optim.accounting import *  # noqa: F403
    from adafrugal.optim.combined import *  # noqa: F403
    from adafrugal.optim.controls import *  # noqa: F403
    from adafrugal.optim.frugal import *  # noqa: F403
    from adafrugal.optim.groups import *  # noqa: F403
    from adafrugal.optim.in_backward import *  # noqa: F403
    from adafrugal.optim.refresh import *  # noqa: F403
    from adafrugal.optim.registry import *  # noqa: F403
    from adafrugal.optim.state_free import *  # noqa: F403
    from adafrugal.optim.subspaces import *  # noqa: F403

_NAMES = {
    "accounting": "StateBytes state_bytes",
    "combined": "Several",
    "controls": "Constant Control CosineDecay Displacement LinearDecay LossAware",
    "frugal": "Frugal",
    "groups": "ParameterGroups Rule default_rules split_parameters",
    "in_backward": "UpdateInBackward",
    "refresh": "Refresh",
    "registry": "register",
    "state_free": "StateFree",
    "subspaces": "Blocks Columns RandK RandPerm Random Regions Rows SVD Slab Subspace check_subspace",
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_MODULE_OF)


if not TYPE_CHECKING:  # a checker of types would believe that every name exists

    def __getattr__(name: str) -> Any:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
