"""What a conversion is told to do; stored in the model's config.json under "moefication"."""

from dataclasses import asdict, dataclass, field
from typing import Any

from .modeling.moefied import FORMAT_VERSION
from .modeling.routers import ROUTERS
from .modeling.selection import ALLOCATIONS, resolve_selection
from .splitting import SPLITTERS


@dataclass
class MoeficationConfig:
    """Settings of a conversion.

    Args:
        num_experts: experts per FFN; None derives it from `expert_size`.
        expert_size: neurons per expert (the paper uses 32); ignored where `num_experts` is given.
        splitter: how neurons are grouped: "random", "parameter_clustering", "coactivation".
        router: what predicts the experts a token needs: "linear", "prior_approximate", "mlp",
            "similarity", "random".
        selection: `{"type": "top_k", "k": 0.2}`; k is a share of the experts (float), a count (int), or one of these
            per layer; `"allocation": "sensitivity"` spreads an average k over layers by their measured sensitivity,
            "uniform" gives each layer the same. Without "allocation": by sensitivity where there is calibration data.
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
    selection: dict[str, Any] = field(default_factory=lambda: {"type": "top_k", "k": 0.2})
    layers: list[int] | None = None
    calibration_tokens: int = 100_000
    seed: int = 0

    def __post_init__(self):
        if self.num_experts is not None:
            self.expert_size = None
        elif self.expert_size is None:
            raise ValueError("give num_experts or expert_size")
        for what, name, registry in (("splitter", self.splitter, SPLITTERS), ("router", self.router, ROUTERS)):
            if name not in registry:
                raise ValueError(f"unknown {what} {name!r}; choose from {', '.join(registry)}")
        if not isinstance(self.calibration_tokens, int) or self.calibration_tokens < 1:
            raise ValueError(f"calibration_tokens must be a positive integer, got {self.calibration_tokens!r}")
        k, allocation = self.selection.get("k"), self.selection.get("allocation", "uniform")
        if allocation not in ALLOCATIONS:
            raise ValueError(f"unknown allocation {allocation!r}; choose from {', '.join(ALLOCATIONS)}")
        if isinstance(k, list | tuple) and allocation != "uniform":
            raise ValueError("a list of k fixes every layer's budget: leave out the allocation")
        resolve_selection(  # one layer of a huge number of experts: finds bad names and shares, whatever the model
            {**self.selection, "k": k[0] if isinstance(k, list | tuple) and k else k, "allocation": "uniform"}, [2**31]
        )

    def section(self) -> dict[str, Any]:
        """The `moefication` section of a config.json."""
        return {"format_version": FORMAT_VERSION, **asdict(self)}
