"""Reorder the neurons of an FFN, with what an optimizer remembers of them."""

from typing import Any

import torch
from torch import nn

from ..errors import MoefyError
from ..modeling.ffn_sites import FfnSite
from ..modeling.offload import Reordered, offload_hook
from ..modeling.routed_activation import is_routed


def check_plain(site: FfnSite) -> None:
    """
    Raises:
        MoefyError: one of the FFN's Linears is more than a weight and a bias (pruning masks, weight or spectral norm,
            adapters): what it holds beside these would stay in the old order of neurons.
    """
    for path in site.spec.linears:
        linear = site.owner.get_submodule(path)
        held = [name for name, _ in (*linear.named_parameters(), *linear.named_buffers())]
        if more := sorted({*held} - {"weight", "bias"}):
            raise MoefyError(
                f"{site.name}: {path} holds {', '.join(more)} beside its weight and bias, which cannot follow neurons "
                "that are permuted: make pruning or a parametrization permanent first (torch.nn.utils.prune.remove, "
                "torch.nn.utils.parametrize.remove_parametrizations), merge adapters (merge_and_unload)"
            )


@torch.no_grad()
def permute_neurons_(site: FfnSite, order: torch.Tensor, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Reorder the neurons of one FFN in place, with what the optimizer remembers of them. Its function is unchanged.

    Parameters that accelerate has offloaded stay where they are, and are read in this order from then on.

    Args:
        order: (f,) the old index of each new neuron, a permutation of range(f).
        optimizer: its per-parameter tensors of the parameter's shape (Adam's moments) are permuted alike.

    Raises:
        MoefyError: `order` is no permutation, a parameter is sharded, quantised or adapted, the optimizer keeps state
            of another shape (Adafactor, 8-bit) or copies of parameters (it does not hold a trainable one itself);
            nothing is changed then.
    """
    check_permutation(site, order)
    check_plain(site)
    neurons = site.sizes[1]
    tensors: list[tuple[torch.Tensor, int, torch.Tensor]] = []
    offloaded: list[tuple[Any, str, int, torch.Tensor]] = []
    held = {id(param) for group in optimizer.param_groups for param in group["params"]} if optimizer else set()
    for name, param, dim, blocks in site.neuron_dims():
        hook = offload_hook(site.owner.get_submodule(name.rpartition(".")[0])) if param.is_meta else None
        if type(param) is not nn.Parameter or param.shape[dim] != blocks * neurons or (param.is_meta and not hook):
            kind = f"{type(param).__name__} of shape {tuple(param.shape)}"
            raise MoefyError(
                f"{site.name}: {name} is a {kind}; sharded, quantised or adapted neurons cannot be permuted"
            )
        if optimizer and param.requires_grad and id(param) not in held:
            raise MoefyError(
                f"{site.name}: {name} is trained, but not by the {type(optimizer).__name__} itself: copies that it "
                "keeps elsewhere cannot follow a permutation"
            )
        whole = torch.cat([order + block * neurons for block in range(blocks)])
        if hook is not None:
            offloaded.append((hook, name.rpartition(".")[2], dim, whole))
            continue
        whole = whole.to(param.device)
        tensors.append((param, dim, whole))
        tensors += [(moment, dim, whole) for moment in moments(optimizer, param, f"{site.name}.{name}")]
    if is_routed(site.act) and getattr(site.act, "neuron_order", None) is not None:
        tensors.append((site.act.neuron_order, 0, order.to(site.act.neuron_order.device)))
    for tensor, dim, whole in tensors:
        tensor.copy_(tensor.index_select(dim, whole))
    for hook, name, dim, whole in offloaded:
        if not isinstance(hook.weights_map, Reordered):
            hook.weights_map = Reordered(hook.weights_map)
        hook.weights_map.reorder_(name, dim, whole)
    torch.clear_autocast_cache()  # it may hold half-precision copies in the old order


def check_permutation(site: FfnSite, order: torch.Tensor) -> None:
    """Check an order of an FFN's neurons.

    Raises:
        MoefyError: `order` is no permutation.
    """
    neurons = site.sizes[1]
    if order.dtype != torch.int64 or not torch.equal(order.cpu().sort().values, torch.arange(neurons)):
        raise MoefyError(
            f"{site.name}: `order` must be a permutation of range({neurons}), got shape {tuple(order.shape)}"
        )


def moments(optimizer: torch.optim.Optimizer | None, param: nn.Parameter, name: str) -> list[torch.Tensor]:
    """Return what an optimizer remembers of each number of a parameter.

    Raises:
        MoefyError: it keeps anything else of it but single numbers (Adafactor's rows and columns, 8-bit blocks).
    """
    tensors = []
    for key, value in (optimizer.state.get(param, {}) if optimizer else {}).items():
        if torch.is_tensor(value) and value.dim() > 0:
            if value.shape != param.shape or type(value) not in (torch.Tensor, nn.Parameter):
                what = f"{type(optimizer).__name__} keeps {key!r}, a {type(value).__name__} of {tuple(value.shape)}"
                raise MoefyError(
                    f"{what}, for {name} of shape {tuple(param.shape)}: such state cannot follow a permutation; use "
                    "AdamW or SGD"
                )
            tensors.append(value)
    return tensors
