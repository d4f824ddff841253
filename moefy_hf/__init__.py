"""moefy_hf: run a trained dense Transformer as a Mixture of Experts.

Zhang et al., "MoEfication: Transformer Feed-forward Layers are Mixtures of Experts", Findings of ACL 2022.
"""

from .adapters import permute_adapter_
from .architectures import load_checkpoint, moefied_class
from .budgets import allocate_budgets
from .callback import MoEficationCallback
from .cards import model_card, write_card
from .compensation import compensate_
from .configuration import MoeficationConfig
from .conversion import ConversionReport, moefy_
from .distillation import DistillationCallback
from .evaluation import Sweep, evaluate
from .exporting import export
from .facts import add_facts
from .hub import PushError, push_to_hub
from .learned_selection import LearnedSelectionCallback
from .modeling.ffn_sites import find_sites, permute_neurons_
from .prediction import predict_quality
from .profiling import profile
from .reach import measure_reach
from .rerouting import reroute_
from .router_fitting import fit_routers
from .schedule import Phase
from .sparsity import SparsityPenaltyCallback, relufy_
from .targets import search, share_within
from .verification import verify

__all__ = [
    "ConversionReport",
    "DistillationCallback",
    "LearnedSelectionCallback",
    "MoEficationCallback",
    "MoeficationConfig",
    "Phase",
    "PushError",
    "SparsityPenaltyCallback",
    "Sweep",
    "add_facts",
    "allocate_budgets",
    "compensate_",
    "evaluate",
    "export",
    "find_sites",
    "fit_routers",
    "load_checkpoint",
    "measure_reach",
    "model_card",
    "moefied_class",
    "moefy_",
    "permute_adapter_",
    "permute_neurons_",
    "predict_quality",
    "profile",
    "push_to_hub",
    "relufy_",
    "reroute_",
    "search",
    "share_within",
    "verify",
    "write_card",
]
