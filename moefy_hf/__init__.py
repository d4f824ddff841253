"""moefy_hf: run a trained dense Transformer as a Mixture of Experts.

Zhang et al., "MoEfication: Transformer Feed-forward Layers are Mixtures of Experts", Findings of ACL 2022.
"""

from .budgets import allocate_budgets
from .callback import MoEficationCallback
from .configuration import MoeficationConfig
from .conversion import ConversionReport, moefied_class, moefy_
from .distillation import DistillationCallback
from .evaluation import Sweep, evaluate
from .exporting import export
from .modeling.ffn_sites import find_sites, permute_neurons_
from .profiling import profile
from .router_fitting import fit_routers
from .schedule import Phase
from .sparsity import SparsityPenaltyCallback, relufy_

__all__ = [
    "ConversionReport",
    "DistillationCallback",
    "MoEficationCallback",
    "MoeficationConfig",
    "Phase",
    "SparsityPenaltyCallback",
    "Sweep",
    "allocate_budgets",
    "evaluate",
    "export",
    "find_sites",
    "fit_routers",
    "moefied_class",
    "moefy_",
    "permute_neurons_",
    "profile",
    "relufy_",
]
