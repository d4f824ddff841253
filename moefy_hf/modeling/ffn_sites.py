"""The FFNs of a model, where they lie, and the in-place permutation that turns blocks of neurons into experts.

Symbols: T tokens, d model width, f FFN width (neurons), E experts, m = f / E neurons per expert.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .errors import MoefyError
from .ffn_layouts import SPECS, FfnSpec
from .ffn_weights import FfnWeights
from .routed_activation import is_routed


@dataclass(frozen=True)
class FfnSite:
    """One FFN of a model: the module that owns it, and the names of its parts.

    Parts are typed Any: to a type checker every attribute of an nn.Module may be a Tensor or a Module.
    """

    name: str
    owner: nn.Module
    spec: FfnSpec

    @property
    def up(self) -> Any:
        return self.owner.get_submodule(self.spec.up)

    @property
    def gate(self) -> Any:
        return self.owner.get_submodule(self.spec.gate) if self.spec.gate else None

    @property
    def down(self) -> Any:
        return self.owner.get_submodule(self.spec.down)

    @property
    def act(self) -> Any:
        return self.owner.get_submodule(self.spec.act)

    def replace_act(self, module: nn.Module) -> None:
        parent, _, child = self.spec.act.rpartition(".")
        setattr(self.owner.get_submodule(parent), child, module)

    @property
    def first(self) -> Any:
        """The Linear whose output the activation sees; its input is the FFN's input x."""
        return self.up if self.gate is None else self.gate

    @property
    def sizes(self) -> tuple[int, int]:
        """(d, f)."""
        down = self.down
        return (down.nf, down.nx) if isinstance(down, Conv1D) else (down.out_features, down.in_features)

    def neuron_dims(self) -> Iterator[tuple[str, nn.Parameter, int, int]]:
        """(name, parameter, dimension that counts neurons, blocks of f along it) of every parameter that neurons
        own."""
        for path, blocks in ((self.spec.gate, 1), (self.spec.up, self.spec.parts)):
            if path is None:
                continue
            for name, param in self.owner.get_submodule(path).named_parameters():
                transposed = param.dim() == 2 and isinstance(self.owner.get_submodule(path), Conv1D)
                yield f"{path}.{name}", param, int(transposed), blocks
        yield f"{self.spec.down}.weight", self.down.weight, int(not isinstance(self.down, Conv1D)), 1

    def weights(self) -> FfnWeights:
        """The FFN as plain tensors, neurons first; parameters keep their gradients and storage."""

        def rows(linear: Any) -> Any:
            return linear.weight.t() if isinstance(linear, Conv1D) else linear.weight

        act = self.act.inner if is_routed(self.act) else self.act
        up, gate = self.up, self.gate
        if self.spec.parts == 2:  # fused: gate rows, then up rows
            gate_rows, up_rows = rows(up).chunk(2)
            gate_bias, up_bias = (None, None) if up.bias is None else up.bias.chunk(2)
            return FfnWeights(up_rows, rows(self.down), act, up_bias, gate_rows, gate_bias)
        if gate is None:
            return FfnWeights(rows(up), rows(self.down), act, up.bias)
        return FfnWeights(rows(up), rows(self.down), act, up.bias, rows(gate), gate.bias)


def find_sites(model: PreTrainedModel) -> list[FfnSite]:
    """Every FFN of a supported transformers model, in forward order of its modules.

    Raises:
        MoefyError: the model type is not supported, or is a Mixture of Experts already; or none of its modules has the
            expected parts.
    """
    model_type = str(model.config.model_type)
    if model_type not in SPECS:
        experts = getattr(model.config, "num_local_experts", None) or getattr(model.config, "num_experts", None)
        what = "already is a Mixture of Experts" if experts else "has no FFN layout that can be split into experts"
        raise MoefyError(f"model type {model_type!r} {what}; supported model types: {', '.join(sorted(SPECS))}")
    specs = SPECS[model_type]
    sites = []
    modules = dict(model.named_modules())
    for name, owner in modules.items():
        prefix = f"{name}." if name else ""
        for spec in specs:
            if all(prefix + path in modules for path in (spec.up, spec.gate, spec.down, spec.act) if path):
                sites.append(FfnSite(name, owner, spec))
                break
    if not sites:
        raise MoefyError(f"no FFN of a {model_type!r} model found; its modules are not laid out as {specs}")
    return sites


def stacks_of(sites: Iterable[FfnSite]) -> dict[str, list[FfnSite]]:
    """FFNs by the name of the module that runs their layers one after another (an encoder, a decoder), in order: what
    is around the outermost list of modules that an FFN is in."""
    found: dict[str, list[FfnSite]] = {}
    for site in sites:
        parts = site.name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), 1)
        found.setdefault(".".join(parts[: max(number - 1, 0)]), []).append(site)
    return found
