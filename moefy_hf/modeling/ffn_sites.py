"""The FFNs of a model, where they lie, and the in-place permutation that turns blocks of neurons into experts.

Symbols: T tokens, d model width, f FFN width (neurons), E experts, m = f / E neurons per expert.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

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


def find_sites(model: nn.Module) -> list[FfnSite]:
    """Every FFN of a supported transformers model, in forward order of its modules.

    Raises:
        ValueError: the model type is not supported, or is a Mixture of Experts already; or none of its modules has the
            expected parts.
    """
    model_type = str(model.config.model_type)
    if model_type not in SPECS:
        experts = getattr(model.config, "num_local_experts", None) or getattr(model.config, "num_experts", None)
        what = "already is a Mixture of Experts" if experts else "has no FFN layout that can be split into experts"
        raise ValueError(f"model type {model_type!r} {what}; supported model types: {', '.join(sorted(SPECS))}")
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
        raise ValueError(f"no FFN of a {model_type!r} model found; its modules are not laid out as {specs}")
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


def check_plain(site: FfnSite) -> None:
    """
    Raises:
        ValueError: one of the FFN's Linears is more than a weight and a bias (pruning masks, weight or spectral norm,
            adapters): what it holds beside these would stay in the old order of neurons.
    """
    for path in filter(None, (site.spec.gate, site.spec.up, site.spec.down)):
        linear = site.owner.get_submodule(path)
        held = [name for name, _ in (*linear.named_parameters(), *linear.named_buffers())]
        if more := sorted({*held} - {"weight", "bias"}):
            raise ValueError(
                f"{site.name}: {path} holds {', '.join(more)} beside its weight and bias, which cannot follow neurons "
                "that are permuted: make pruning or a parametrization permanent first (torch.nn.utils.prune.remove, "
                "torch.nn.utils.parametrize.remove_parametrizations), merge adapters (merge_and_unload)"
            )


@torch.no_grad()
def permute_neurons_(site: FfnSite, order: torch.Tensor, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Reorder the neurons of one FFN in place, with what the optimizer remembers of them. Its function is unchanged.

    Args:
        order: (f,) the old index of each new neuron, a permutation of range(f).
        optimizer: its per-parameter tensors of the parameter's shape (Adam's moments) are permuted alike.

    Raises:
        ValueError: `order` is no permutation, a parameter is sharded, quantised or adapted, the optimizer keeps state
            of another shape (Adafactor, 8-bit) or copies of parameters (it does not hold a trainable one itself);
            nothing is changed then.
    """
    neurons = site.sizes[1]
    if order.dtype != torch.int64 or not torch.equal(order.cpu().sort().values, torch.arange(neurons)):
        raise ValueError(
            f"{site.name}: `order` must be a permutation of range({neurons}), got shape {tuple(order.shape)}"
        )
    check_plain(site)
    tensors: list[tuple[torch.Tensor, int, torch.Tensor]] = []
    held = {id(param) for group in optimizer.param_groups for param in group["params"]} if optimizer else set()
    for name, param, dim, blocks in site.neuron_dims():
        if type(param) is not nn.Parameter or param.shape[dim] != blocks * neurons:
            kind = f"{type(param).__name__} of shape {tuple(param.shape)}"
            raise ValueError(
                f"{site.name}: {name} is a {kind}; sharded, quantised or adapted neurons cannot be permuted"
            )
        if optimizer and param.requires_grad and id(param) not in held:
            raise ValueError(
                f"{site.name}: {name} is trained, but not by the {type(optimizer).__name__} itself: copies that it "
                "keeps elsewhere cannot follow a permutation"
            )
        whole = torch.cat([order + block * neurons for block in range(blocks)]).to(param.device)
        tensors.append((param, dim, whole))
        tensors += [(moment, dim, whole) for moment in moments(optimizer, param, f"{site.name}.{name}")]
    if is_routed(site.act) and getattr(site.act, "neuron_order", None) is not None:
        tensors.append((site.act.neuron_order, 0, order.to(site.act.neuron_order.device)))
    for tensor, dim, whole in tensors:
        tensor.copy_(tensor.index_select(dim, whole))
    torch.clear_autocast_cache()  # it may hold half-precision copies in the old order


def moments(optimizer: torch.optim.Optimizer | None, param: nn.Parameter, name: str) -> list[torch.Tensor]:
    """What an optimizer remembers of each number of a parameter.

    Raises:
        ValueError: it keeps anything else of it but single numbers (Adafactor's rows and columns, 8-bit blocks).
    """
    found = []
    for key, value in (optimizer.state.get(param, {}) if optimizer else {}).items():
        if torch.is_tensor(value) and value.dim() > 0:
            if value.shape != param.shape or type(value) not in (torch.Tensor, nn.Parameter):
                what = f"{type(optimizer).__name__} keeps {key!r}, a {type(value).__name__} of {tuple(value.shape)}"
                raise ValueError(
                    f"{what}, for {name} of shape {tuple(param.shape)}: such state cannot follow a permutation; use "
                    "AdamW or SGD"
                )
            found.append(value)
    return found
