"""The FFNs that are timed: of a preset's shape, with random weights, or a checkpoint's own; and how each method runs
one."""

import copy
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist

import torch
import torch.nn.functional as F
from moefy_ffn import MoeFfn
from torch import nn

from ..errors import MoefyError
from ..loading import MoefiedModel, check_moefied, is_inline, load, routed
from ..measure.router_inputs import run_alone
from ..modeling.ffn_sites import FfnSite, FfnWeights
from ..modeling.moefied import is_moefied
from ..modeling.routed_activation import FollowReplacements
from ..runtime.backend_base import kernel_activation
from ..runtime.cpu_kernel import CpuKernel
from ..runtime.sparse_ffn import SparseFfn, misfit
from ..runtime.torch_rows import TorchRows
from .presets import preset_config, shape_of
from .settings import DTYPES, Settings
from .timing import can_prepack

FUSED = {"relu": ("relu", ""), "silu": ("swish", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh")}


@dataclass
class Layer:
    """One FFN as all methods want it. Copies share all weights but `down`, which sparse methods keep by neurons.

    Attributes:
        site, weights: as a model has it, routed.
        indexed, compiled: as the implementations "torch" and "cpu" want it.
        kernel: of "cpu".
        packed: (prepacked weight, bias) of gate, up and down; nothing where oneDNN cannot prepack.
        fused: oneDNN's name and variant of the activation, where a product can end with it.
    """

    site: FfnSite
    weights: FfnWeights
    indexed: FfnSite
    compiled: FfnSite
    kernel: MoeFfn
    packed: list[tuple[torch.Tensor, torch.Tensor | None]]
    fused: tuple[str, str] | None


def preset_layers(settings: Settings, least_bytes: int, nonzero: float | None) -> list[Layer]:
    """Return FFNs of a preset's shape, enough to have `least_bytes` of weights, normally distributed.

    Args:
        nonzero: biases that leave at most this share of ReLU's neurons non-zero.

    Raises:
        MoefyError: an expert size that does not divide the FFN, or `nonzero` where neurons are never zero.
    """
    config = preset_config(settings.source, settings.moefication().section())
    (template, *_) = check_moefied(shape_of(config)).moe_sites()
    name = kernel_activation(routed(template).inner)
    if nonzero is not None and (name != "relu" or template.weights().gate is not None):
        raise MoefyError(f"nonzero={nonzero} wants an FFN of ReLU: that of {settings.preset} has {name}")
    dtype, generator = DTYPES[settings.dtype], torch.Generator().manual_seed(0)
    layers: list[Layer] = []
    made = 0  # bytes
    while made < least_bytes or not layers:
        site = copy_of(template)
        site.owner.to_empty(device="cpu")
        for linear in {site.first, site.up, site.down}:  # routers stay float32
            linear.to(dtype)
        for tensor in itertools.chain(site.owner.parameters(), site.owner.buffers()):
            tensor.normal_(std=tensor.shape[-1] ** -0.5, generator=generator) if tensor.dim() == 2 else tensor.zero_()
        if nonzero is not None:  # as x and the rows are noise, neurons are normal: a bias leaves that share positive
            bias = torch.full((site.sizes[1],), NormalDist().inv_cdf(0.9 * nonzero), dtype=dtype)
            site.up.bias = nn.Parameter(bias, requires_grad=False)
        layers.append(layer_of(site))
        made += weight_bytes(site)
    return layers


def checkpoint_layers(settings: Settings, least_bytes: int) -> list[Layer]:
    """Return every routed FFN of a checkpoint, with its weights, router and budget, again and again until there are
    `least_bytes`.

    Raises:
        MoefyError: as `load_moefied`.
    """
    sites = load_moefied(settings).moe_sites()
    layers, made = list[Layer](), 0
    while made < least_bytes or len(layers) < len(sites):
        site = sites[len(layers) % len(sites)]
        layers.append(layer_of(copy_of(site)))
        made += weight_bytes(site)
    return layers


def load_moefied(settings: Settings) -> MoefiedModel:
    """Load the checkpoint that is timed, at the budget that is timed.

    Raises:
        MoefyError: the checkpoint is not MoEfied, or its FFNs cannot run alone.
    """
    loaded = load(settings.source, dtype=DTYPES[settings.dtype]).eval()
    if not is_moefied(loaded):
        raise MoefyError(f"{settings.source} is not MoEfied: moefy convert makes a checkpoint that is")
    model = check_moefied(loaded)
    if not run_alone(model.moe_sites()):
        raise MoefyError(
            f"the FFNs of {settings.source} have one router for all layers, so that none runs alone: measure the "
            "whole model"
        )
    if settings.share is not None:
        model.set_selection(k=float(settings.share), allocation="uniform")
    return model


def weight_bytes(site: FfnSite) -> int:
    """Return how much memory the parameters take that neurons of an FFN own."""
    return sum(param.nbytes for _, param, _, _ in site.neuron_dims())


def layer_of(site: FfnSite) -> Layer:
    """Return an FFN as all methods want it.

    Raises:
        MoefyError: the sparse implementations cannot run it.
    """
    reason = misfit(site, CpuKernel)
    if reason is not None:
        raise MoefyError(f"no sparse implementation can run {site.name}: {reason}")
    changed = {id(linear.weight) for linear in SparseFfn(CpuKernel(site)).transposed()}
    shared = [param for param in site.owner.parameters() if id(param) not in changed]
    compiled = copy_of(site, shared)
    indexed = copy_of(compiled, compiled.owner.parameters())
    SparseFfn(TorchRows(indexed)).install_()
    backend = CpuKernel(compiled)
    SparseFfn(backend).install_()
    weights, packed = site.weights(), list[tuple[torch.Tensor, torch.Tensor | None]]()
    if can_prepack(weights.up.dtype):
        matrices = [(weights.gate, weights.gate_bias), (weights.up, weights.up_bias), (weights.down, site.down.bias)]
        pack = torch.ops.mkldnn._reorder_linear_weight
        packed = [(pack(matrix.contiguous()), bias) for matrix, bias in matrices if matrix is not None]
    fused = FUSED.get(backend.activation)
    return Layer(site, weights, indexed, compiled, backend.prepared(), packed, fused)


def copy_of(site: FfnSite, shared: Iterable[torch.Tensor] = ()) -> FfnSite:
    """Return a copy of an FFN alone, in an owner of its own; `shared` parameters are those of the original."""
    owner, memo = nn.Module(), dict[int, torch.Tensor | list]((id(tensor), tensor) for tensor in shared)
    memo[id(site.act.handles)] = []  # of hooks on the owner, which is not copied
    for path in (*site.spec.linears, site.spec.act):
        *parents, name = path.split(".")
        parent = owner
        for step in parents:
            parent.add_module(step, parent._modules.get(step) or nn.Module())
            parent = parent.get_submodule(step)
        parent.add_module(name, copy.deepcopy(site.owner.get_submodule(path), memo))  # one memo: hooks find the copies
    if site.spec.dropout is not None:  # a module, or a probability
        setattr(owner, site.spec.dropout, getattr(site.owner, site.spec.dropout))
    copied = FfnSite(site.name, owner, site.spec)
    FollowReplacements(copied.act, copied)(owner, ())  # which an owner's first call does
    return copied


def dense(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """Run all neurons of an FFN on x (T, d), by torch."""
    return F.linear(layer.weights.neurons(x), layer.weights.down, layer.site.down.bias)


def prepacked(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """Run all neurons of an FFN on x (T, d), by oneDNN on prepacked weights."""

    def linear(x: torch.Tensor, packed: tuple, act: str = "none", how: str = "") -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, *packed, act, [], how)

    *gate, up, down = layer.packed
    first = gate[0] if gate else up
    hidden = layer.weights.act(linear(x, first)) if layer.fused is None else linear(x, first, *layer.fused)
    return linear(hidden * linear(x, up) if gate else hidden, down)


def through_modules(site: FfnSite, x: torch.Tensor) -> torch.Tensor:
    """Run an FFN on x (T, d) as the code of the model does."""
    first, up = site.first(x), None
    if site.spec.parts == 2:
        up, first = first.chunk(2, -1) if site.spec.up_first else first.chunk(2, -1)[::-1]
    elif site.gate is not None:
        up = site.up(x)
    hidden = site.act.inner(first) if is_inline(site) else site.act(first)  # a function: the hook on `down` routes
    return site.down(hidden if up is None else hidden * up)


def masked(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """Run an FFN on x (T, d) by implementation "masked"."""
    return through_modules(layer.site, x)


def indexed(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """Run an FFN on x (T, d) by implementation "torch"."""
    return through_modules(layer.indexed, x)


def compiled(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """Run an FFN on x (T, d) by implementation "cpu".

    Where the kernel routes by itself, it runs alone; a model spends some microseconds more on finding it.
    """
    return layer.kernel(x)[0] if layer.kernel.routed else through_modules(layer.compiled, x)
