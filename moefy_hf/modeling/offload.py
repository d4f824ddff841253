"""Parameters that accelerate keeps on disk or in another memory (`device_map`) while their module does not run."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn


def offload_hook(module: nn.Module) -> Any:
    """Return accelerate's hook that holds a module's own parameters; None where the module holds them itself."""
    hook = vars(module).get("_hf_hook")
    for each in getattr(hook, "hooks", [hook]):
        if getattr(each, "weights_map", None) is not None:
            return each
    return None


def is_offloaded(model: nn.Module) -> bool:
    """Return whether accelerate keeps any parameter of a model elsewhere."""
    return any(offload_hook(module) is not None for module in model.modules())


def held(module: nn.Module, name: str) -> Any:
    """Return a parameter of a module, or None; of one that is offloaded, a copy that is read now."""
    tensor = getattr(module, name)
    if tensor is None or not tensor.is_meta or (hook := offload_hook(module)) is None:
        return tensor
    return hook.weights_map[name].to(hook.execution_device, tensor.dtype)


def tensor_of(model: nn.Module, name: str) -> Any:
    """Return a parameter or buffer by its name; of one that is offloaded, a copy that is read now."""
    path, _, leaf = name.rpartition(".")
    return held(model.get_submodule(path), leaf)


def device_of(module: nn.Module) -> torch.device:
    """Return where a module, or the first in it that has parameters, computes."""
    for each in module.modules():
        for tensor in each.parameters(recurse=False):
            hook = offload_hook(each) if tensor.is_meta else None
            return tensor.device if hook is None else torch.device(hook.execution_device)
    return torch.device("cpu")


class Reordered(Mapping[str, torch.Tensor]):
    """What an offloaded module's hook reads its parameters from, some of them in another order of neurons.

    Nothing is rewritten: a parameter gets its order when it is read.

    Args:
        weights: the parameters as they are kept, by name.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor]):
        self.weights = weights
        self.orders: dict[str, tuple[int, torch.Tensor]] = {}

    def reorder_(self, name: str, dim: int, order: torch.Tensor) -> None:
        """Reorder a parameter along a dimension: `order` (n,) has the present place of each new row."""
        _, before = self.orders.get(name, (dim, None))
        self.orders[name] = dim, order if before is None else before[order]

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self.weights[name]
        if name not in self.orders:
            return tensor
        dim, order = self.orders[name]
        return tensor.index_select(dim, order.to(tensor.device))

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)
