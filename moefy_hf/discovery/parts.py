"""The kinds of parts that FFNs are made of: Linears, activations, norms, dropout."""

import copy
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


def linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """Return (inputs, outputs) of a Linear of any kind, adapted and quantised ones too; None for other modules."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return (inputs, outputs) if isinstance(inputs, int) and isinstance(outputs, int) else None


def is_plain_linear(module: nn.Module) -> bool:
    """Return whether a module is a Linear and nothing more: neither adapted, quantised nor offloaded."""
    return type(module) in (nn.Linear, Conv1D) or type(module).__name__ == "FalconLinear"


def is_activation(module: nn.Module) -> bool:
    """Return whether a module is an activation: no parameters, no parts, and an elementwise function, not a linear
    one."""
    if next(module.parameters(), None) is not None or next(module.children(), None) is not None:
        return False
    return "Dropout" not in type(module).__name__ and is_elementwise(copy.copy(module).eval())


def is_elementwise(function: Callable[..., Any]) -> bool:
    """Return whether a function treats each number of a tensor alike, and is not linear."""
    x = torch.linspace(-3, 3, 8, device="cpu").reshape(1, 2, 4)
    try:
        with torch.no_grad():
            y, flipped = function(x), function(x.flip(-1, -2))
            ratio = y / x
            alike = y.shape == x.shape and torch.equal(y.flip(-1, -2), flipped)
            return alike and not torch.allclose(ratio, ratio[0, 0, 0])
    except Exception:  # whatever a function of something else raises
        return False


def functions_of(module: nn.Module) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield the activation functions that a module keeps as attributes: XLM's `act`."""
    for name, value in vars(module).items():
        if callable(value) and not isinstance(value, nn.Module | type) and not name.startswith("_"):
            if name != "forward" and is_elementwise(value):
                yield name, value


def is_norm(module: nn.Module) -> bool:
    """Return whether a module normalises its input, by its class's name."""
    return next(module.children(), None) is None and "norm" in type(module).__name__.lower()


def dropouts(module: nn.Module) -> dict[str, Callable[[float], None]]:
    """Return the dropouts that a module has itself: attribute -> what sets its probability."""
    found: dict[str, Callable[[float], None]] = {}
    for name, child in module.named_children():
        if isinstance(child, nn.Dropout):
            found[name] = partial(setattr, child, "p")
    for name, value in vars(module).items():
        if isinstance(value, float) and "dropout" in name:
            found[name] = partial(setattr, module, name)
    return found


def words(name: str) -> set[str]:
    """Return the words of a name, in lower case: "SharedExpertsMLP" and "shared_experts.mlp" have the same."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name)
    return set(re.split(r"[^a-z0-9]+", spaced.lower()))
