"""moefy_hf: run a trained dense Transformer as a Mixture of Experts.

Zhang et al., "MoEfication: Transformer Feed-forward Layers are Mixtures of Experts", Findings of ACL 2022.
"""

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {  # public name -> the module that has it, imported when the name is first used
    "add_facts": "hub.facts",
    "allocate_budgets": "conversion.budgets",
    "check_quality": "evaluation.quality_check",
    "compensate_": "conversion.compensation",
    "ConversionReport": "conversion.convert",
    "DistillationCallback": "training.distillation",
    "evaluate": "evaluation.sweep",
    "export": "exporters.export",
    "find_budget": "evaluation.search",
    "find_sites": "modeling.ffn_sites",
    "fit_routers": "conversion.fit_routers",
    "LearnedSelectionCallback": "training.learned_selection",
    "load_checkpoint": "loading",
    "measure_reach": "conversion.thresholds",
    "model_card": "hub.card",
    "MoEficationCallback": "training.callback",
    "MoEficationConfig": "config",
    "moefied_class": "loading",
    "moefy_": "conversion.convert",
    "permute_adapter_": "conversion.adapters",
    "permute_neurons_": "conversion.permute",
    "Phase": "training.schedule",
    "profile": "measure.profile",
    "push_to_hub": "hub.push",
    "PushError": "errors",
    "relufy_": "training.sparsity",
    "reroute_": "conversion.reroute",
    "SparsityPenaltyCallback": "training.sparsity",
    "Sweep": "evaluation.sweep",
    "verify": "hub.verification",
    "write_card": "hub.card",
}
__version__ = "0.1.0"
__all__ = sorted(_HOMES)

if TYPE_CHECKING:  # for editors and type checkers
    from .config import MoEficationConfig as MoEficationConfig
    from .conversion.adapters import permute_adapter_ as permute_adapter_
    from .conversion.budgets import allocate_budgets as allocate_budgets
    from .conversion.compensation import compensate_ as compensate_
    from .conversion.convert import ConversionReport as ConversionReport
    from .conversion.convert import moefy_ as moefy_
    from .conversion.fit_routers import fit_routers as fit_routers
    from .conversion.permute import permute_neurons_ as permute_neurons_
    from .conversion.reroute import reroute_ as reroute_
    from .conversion.thresholds import measure_reach as measure_reach
    from .errors import PushError as PushError
    from .evaluation.quality_check import check_quality as check_quality
    from .evaluation.search import find_budget as find_budget
    from .evaluation.sweep import Sweep as Sweep
    from .evaluation.sweep import evaluate as evaluate
    from .exporters.export import export as export
    from .hub.card import model_card as model_card
    from .hub.card import write_card as write_card
    from .hub.facts import add_facts as add_facts
    from .hub.push import push_to_hub as push_to_hub
    from .hub.verification import verify as verify
    from .loading import load_checkpoint as load_checkpoint
    from .loading import moefied_class as moefied_class
    from .measure.profile import profile as profile
    from .modeling.ffn_sites import find_sites as find_sites
    from .training.callback import MoEficationCallback as MoEficationCallback
    from .training.distillation import DistillationCallback as DistillationCallback
    from .training.learned_selection import LearnedSelectionCallback as LearnedSelectionCallback
    from .training.schedule import Phase as Phase
    from .training.sparsity import SparsityPenaltyCallback as SparsityPenaltyCallback
    from .training.sparsity import relufy_ as relufy_


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = found  # once
    return found


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
