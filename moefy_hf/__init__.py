"""moefy_hf: run a trained dense Transformer as a Mixture of Experts.

Zhang et al., "MoEfication: Transformer Feed-forward Layers are Mixtures of Experts", Findings of ACL 2022.
"""

import importlib
import warnings
from typing import TYPE_CHECKING, Any

_HOMES = {  # public name -> the module that has it, imported when the name is first used
    "allocate_budgets_": "conversion.budgets",
    "calibrate_thresholds_": "conversion.thresholds",
    "check_quality": "evaluation.quality_check",
    "compensate_": "conversion.compensation",
    "ConversionReport": "conversion.convert",
    "DistillationCallback": "training.distillation",
    "evaluate": "evaluation.sweep",
    "export": "exporters.export",
    "find_budget": "evaluation.search",
    "fit_routers_": "conversion.fit_routers",
    "LearnedSelectionCallback": "training.learned_selection",
    "load": "loading",
    "MoEficationCallback": "training.callback",
    "MoEficationConfig": "config",
    "moefy_": "conversion.convert",
    "MoefyError": "errors",
    "permute_adapter_": "conversion.adapters",
    "Phase": "training.schedule",
    "plan": "planning.plan",
    "profile": "measure.profile",
    "push_to_hub": "hub.push",
    "relufy_": "training.sparsity",
    "reroute_": "conversion.reroute",
    "ROUTERS": "modeling.routers",
    "SELECTIONS": "modeling.selection",
    "SparsityPenaltyCallback": "training.sparsity",
    "SPLITTERS": "splitters",
    "Sweep": "evaluation.sweep",
}
_OLD = {  # public name of version 0.1 -> its module and name now; gone with the next release
    "add_facts": ("hub.facts", "add_facts"),
    "allocate_budgets": ("conversion.budgets", "allocate_budgets_"),
    "find_sites": ("modeling.ffn_sites", "find_sites"),
    "fit_routers": ("conversion.fit_routers", "fit_routers_"),
    "load_checkpoint": ("loading", "load"),
    "measure_reach": ("conversion.thresholds", "calibrate_thresholds_"),
    "model_card": ("hub.card", "model_card"),
    "MoeficationConfig": ("config", "MoEficationConfig"),
    "moefied_class": ("loading", "moefied_class"),
    "permute_neurons_": ("conversion.permute", "permute_neurons_"),
    "predict_quality": ("evaluation.quality_check", "check_quality"),
    "PushError": ("errors", "PushError"),
    "search": ("evaluation.search", "search"),
    "share_within": ("evaluation.search", "share_within"),
    "verify": ("hub.verification", "verify"),
    "write_card": ("hub.card", "write_card"),
}
__version__ = "0.1.0"
__all__ = sorted(_HOMES)

if TYPE_CHECKING:  # for editors and type checkers
    from .config import MoEficationConfig as MoEficationConfig
    from .conversion.adapters import permute_adapter_ as permute_adapter_
    from .conversion.budgets import allocate_budgets_ as allocate_budgets_
    from .conversion.compensation import compensate_ as compensate_
    from .conversion.convert import ConversionReport as ConversionReport
    from .conversion.convert import moefy_ as moefy_
    from .conversion.fit_routers import fit_routers_ as fit_routers_
    from .conversion.reroute import reroute_ as reroute_
    from .conversion.thresholds import calibrate_thresholds_ as calibrate_thresholds_
    from .errors import MoefyError as MoefyError
    from .evaluation.quality_check import check_quality as check_quality
    from .evaluation.search import find_budget as find_budget
    from .evaluation.sweep import Sweep as Sweep
    from .evaluation.sweep import evaluate as evaluate
    from .exporters.export import export as export
    from .hub.push import push_to_hub as push_to_hub
    from .loading import load as load
    from .measure.profile import profile as profile
    from .modeling.routers import ROUTERS as ROUTERS
    from .modeling.selection import SELECTIONS as SELECTIONS
    from .planning.plan import plan as plan
    from .splitters import SPLITTERS as SPLITTERS
    from .training.callback import MoEficationCallback as MoEficationCallback
    from .training.distillation import DistillationCallback as DistillationCallback
    from .training.learned_selection import LearnedSelectionCallback as LearnedSelectionCallback
    from .training.schedule import Phase as Phase
    from .training.sparsity import SparsityPenaltyCallback as SparsityPenaltyCallback
    from .training.sparsity import relufy_ as relufy_


def __getattr__(name: str) -> Any:
    if name in _OLD:
        module, new = _OLD[name]
        place = f"moefy_hf.{new}" if new in _HOMES else f"moefy_hf.{module}.{new}"
        warnings.warn(f"moefy_hf.{name} is {place} now", FutureWarning, stacklevel=2)
    elif name in _HOMES:
        module, new = _HOMES[name], name
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = vars(importlib.import_module(f".{module}", __name__))[new]
    globals()[name] = value  # so that this runs, and warns, once
    return value


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
