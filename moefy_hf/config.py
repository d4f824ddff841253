"""What a conversion is told to do; stored in the model's config.json under "moefication"."""

from dataclasses import asdict, dataclass, field
from typing import Any

from .modeling.allocation import check_selection, count_experts, resolve_selection, setting_name
from .modeling.moefied import FORMAT_VERSION
from .modeling.routers import router_class
from .splitters import SPLITTERS


@dataclass
class MoeficationConfig:
    """Settings of a conversion.

    Args:
        num_experts: experts per FFN; None derives it from `expert_size`.
        expert_size: neurons per expert (the paper uses 32); ignored where `num_experts` is given.
        splitter: how neurons are grouped: "random", "parameter_clustering", "gate_clustering", "coactivation",
            "activation_markers", "output_aware".
        router: what predicts the experts a token needs. Fitted: "linear", "low_rank" (for many small experts),
            "prior_approximate", "sigmoid", "mlp", "norm_regression", "relu_rmsnorm"; and "pre_gated", one for all
            layers, so that experts are known ahead. Made of the experts' weights: "analytic", "mean_gate",
            "partial_input", "similarity"; and "random".
        router_settings: what the router is made with, instead of its defaults: `{"rank": 64}` of "low_rank",
            `{"hidden": 128}` of "norm_regression", `{"inputs": 0.4}` (share of the FFN's inputs that it reads) of
            "partial_input".
        selection: `{"type": "top_k", "k": 0.2}`; k is a share of the experts (float), a count (int), or one of these
            per layer; `"allocation": "sensitivity"` spreads an average k over layers by their measured sensitivity,
            "angular" by how far they turn the hidden states, "uniform" gives each layer the same. Without
            "allocation": by sensitivity where there is calibration data.
            Types "threshold", "top_p" and "level" compute as many experts as a token needs, k on average.
        shared_experts: how many experts run for every token; `k` counts them. They are made of the neurons that most
            tokens need (CMoE); the splitter groups the others.
        compensation: let an expert that does not run contribute what it does on average when it does not.
        layers: positions of the FFNs to convert, in forward order; all by default.
        calibration_tokens: at most so many tokens of the calibration data are used.
        seed: of splits and router fitting.

    Raises:
        ValueError: an unknown name (the valid ones are listed) or a number out of range.
    """

    num_experts: int | None = None
    expert_size: int | None = 32
    splitter: str = "parameter_clustering"
    router: str = "linear"
    router_settings: dict[str, Any] = field(default_factory=dict)
    selection: dict[str, Any] = field(default_factory=lambda: {"type": "top_k", "k": 0.2})
    shared_experts: int = 0
    compensation: bool = False
    layers: list[int] | None = None
    calibration_tokens: int = 100_000
    seed: int = 0

    def __post_init__(self):
        if self.num_experts is not None:
            self.expert_size = None
        elif self.expert_size is None:
            raise ValueError("give num_experts or expert_size")
        if self.splitter not in SPLITTERS:
            raise ValueError(f"unknown splitter {self.splitter!r}; choose from {', '.join(SPLITTERS)}")
        router_class(self.router, self.router_settings)
        if not isinstance(self.calibration_tokens, int) or self.calibration_tokens < 1:
            raise ValueError(f"calibration_tokens must be a positive integer, got {self.calibration_tokens!r}")
        shared = self.shared_experts
        if not isinstance(shared, int) or isinstance(shared, bool) or shared < 0:
            raise ValueError(f"shared_experts must be a number of experts, 0 or more, got {shared!r}")
        check_selection(self.selection)
        name = setting_name(self.selection["type"])
        if name not in self.selection:
            k = self.selection.get("k")
            for each in k if isinstance(k, list | tuple) and k else [k]:
                count_experts(each, 2**31)  # finds bad shares, whatever the model
        elif not isinstance(self.selection[name], list | tuple):
            resolve_selection(self.selection, [1])

    def section(self) -> dict[str, Any]:
        """The `moefication` section of a config.json."""
        return {"format_version": FORMAT_VERSION, **asdict(self)}
