"""The FFNs of a model, where they lie, and the in-place permutation that turns blocks of neurons into experts.

Symbols: T tokens, d model width, f FFN width (neurons), E experts, m = f / E neurons per expert.
"""

import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from .errors import MoefyError
from .ffn_layouts import FfnSpec
from .ffn_weights import ChangedActivation, FfnWeights
from .offload import device_of, held
from .routed_activation import is_routed
from .section import Section


@dataclass(frozen=True)
class FfnSite:
    """One FFN of a model: the module that owns it, and the names of its parts.

    A layer may own two FFNs, which have the same `name` then, but never the same `key`.

    Parts are typed Any: to a type checker every attribute of an nn.Module may be a Tensor or a Module.
    """

    name: str
    owner: nn.Module
    spec: FfnSpec

    @property
    def key(self) -> str:
        """The name of its `down`, which is no other FFN's."""
        return f"{self.name}.{self.spec.down}".lstrip(".")

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
        """The activation; of an owner that calls a function, a module that computes the same."""
        held = self.held_act
        return held if isinstance(held, nn.Module) else ACT2FN[self.spec.function]

    @property
    def held_act(self) -> Any:
        parent, _, child = self.spec.act.rpartition(".")
        return getattr(self.owner.get_submodule(parent), child, None)

    @property
    def has_act(self) -> bool:
        """Whether the owner keeps its activation, so that a routed one can take its place."""
        return self.held_act is not None

    @property
    def norm(self) -> Any:
        return self.owner.get_submodule(self.spec.norm) if self.spec.norm else None

    def replace_act(self, module: nn.Module) -> None:
        parent, _, child = self.spec.act.rpartition(".")
        setattr(self.owner.get_submodule(parent), child, module)

    @property
    def first(self) -> Any:
        """The Linear whose output the activation sees; its input is the FFN's input x."""
        return self.up if self.gate is None else self.gate

    @property
    def device(self) -> torch.device:
        """Where it computes; parameters that are offloaded lie elsewhere meanwhile."""
        return device_of(self.down)

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
        if self.norm is not None:
            for name, param in self.norm.named_parameters():
                yield f"{self.spec.norm}.{name}", param, 0, 1

    def weights(self) -> FfnWeights:
        """The FFN as plain tensors, neurons first; parameters keep their gradients and storage.

        Those that are offloaded are read for it, and go when it goes.
        """

        def rows(linear: Any) -> Any:
            return held(linear, "weight").t() if isinstance(linear, Conv1D) else held(linear, "weight")

        act = self.act.inner if is_routed(self.act) else self.act
        if self.spec.before is not None:
            act = ChangedActivation(getattr(self.owner, self.spec.before), act)
        up, gate, norm = self.up, self.gate, self.norm
        if self.spec.parts == 2:
            matrices, biases = rows(up).chunk(2), (None, None) if up.bias is None else held(up, "bias").chunk(2)
            g, u = (1, 0) if self.spec.up_first else (0, 1)
            return FfnWeights(matrices[u], rows(self.down), act, biases[u], matrices[g], biases[g], norm)
        if gate is None:
            return FfnWeights(rows(up), rows(self.down), act, held(up, "bias"), norm=norm)
        return FfnWeights(rows(up), rows(self.down), act, held(up, "bias"), rows(gate), held(gate, "bias"), norm)


def find_sites(model: PreTrainedModel, towers: str | Sequence[str] | None = None) -> list[FfnSite]:
    """Find the FFNs of a model that can be split, in the order of its modules.

    A MoEfied checkpoint remembers where its FFNs are; in other models they are searched for (`moefy_hf.discovery`).

    Args:
        model: the model.
        towers: which parts of a composite model: "text", "vision", ... or "all"; None: its text towers, or all where
            it has none. A MoEfied model's are those that were converted.

    Raises:
        MoefyError: the model has none; what looks like one is named, with the reason. Or it has no such tower.
    """
    section = Section.of(model.config)
    if section is not None and section.ffns:
        return remembered_sites(model, section.ffns)
    # a string: no file of that package travels with a checkpoint, whose config remembers
    return importlib.import_module("moefy_hf.discovery.sites").discovered_sites(model, towers)


def remembered_sites(model: PreTrainedModel, ffns: Iterable[Mapping[str, Any]]) -> list[FfnSite]:
    """Return the FFNs that a config names, in the order of the model's modules.

    Args:
        model: the model.
        ffns: layouts (`FfnSpec.to_dict`), with the names of the modules that hold them in "modules".

    Raises:
        MoefyError: none of the model's modules has them.
    """
    modules, layouts = dict(model.named_modules()), [(values["modules"], FfnSpec.from_dict(values)) for values in ffns]
    prefix = prefix_of(model)
    for exact in (True, False):  # a head may hold its base model under another name than its class says
        sites = []
        for name, owner in modules.items():
            below = name.removeprefix(prefix)
            names = starred(below), below
            for place, spec in layouts:
                fits = place in names if exact else any(each.endswith(f".{place}") for each in names)
                if fits and all(f"{name}.{path}".lstrip(".") in modules for path in spec.linears):
                    sites.append(FfnSite(name, owner, spec))
        if sites:
            return sites
    places = ", ".join(dict.fromkeys(place for place, _ in layouts))
    raise MoefyError(f"{type(model).__name__} has none of the FFNs that its config names: {places}")


def place_of(model: PreTrainedModel, name: str, *, numbered: bool = False) -> str:
    """Return the name of a module below the base model, with * for the numbers of layers unless it is `numbered`.

    Heads of one architecture hold their base model under names of their own, which are left out.
    """
    name = name.removeprefix(prefix_of(model))
    return name if numbered else starred(name)


def prefix_of(model: PreTrainedModel) -> str:
    """Return what the names of a base model's modules begin with in this model: nothing in the base model itself."""
    return f"{model.base_model_prefix}." if model.base_model_prefix and model.base_model is not model else ""


def starred(name: str) -> str:
    """Return a module's name with * for the numbers of layers."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def stacks_of(sites: Iterable[FfnSite]) -> dict[str, list[FfnSite]]:
    """FFNs by the name of the module that runs their layers one after another (an encoder, a decoder), in order: what
    is around the outermost list of modules that an FFN is in."""
    found: dict[str, list[FfnSite]] = {}
    for site in sites:
        parts = site.name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), 1)
        found.setdefault(".".join(parts[: max(number - 1, 0)]), []).append(site)
    return found
