"""Run a model again without the layers that would do what they did before."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..measure.contexts import hooked
from ..modeling.ffn_sites import FfnSite


def block_of(model: nn.Module, site: FfnSite) -> nn.Module | None:
    """The layer that an FFN is part of: the outermost element of a ModuleList around it; None where there is none."""
    module, inside = model, False
    for part in site.name.split("."):
        inside, module = isinstance(module, nn.ModuleList), module.get_submodule(part)
        if inside:
            return module
    return None


@contextmanager
def recorded(blocks: list[nn.Module]) -> Iterator[dict[nn.Module, Any]]:
    """What each block returns within, in the order in which they run. Of one that runs twice nothing is kept."""
    outputs: dict[nn.Module, Any] = {}
    runs: dict[nn.Module, int] = dict.fromkeys(blocks, 0)

    def keep(block: nn.Module, args: tuple, output: Any) -> None:
        runs[block] += 1
        outputs[block] = output

    with hooked(block.register_forward_hook(keep) for block in runs):
        yield outputs
    if any(count > 1 for count in runs.values()):
        outputs.clear()


def before(outputs: dict[nn.Module, Any], block: nn.Module | None) -> dict[nn.Module, Any]:
    """The part of a record that was over when `block` began."""
    if block not in outputs:
        return {}
    order = list(outputs)
    return {each: outputs[each] for each in order[: order.index(block)]}


@contextmanager
def replayed(outputs: dict[nn.Module, Any]) -> Iterator[None]:
    """Let blocks return what was recorded instead of running."""
    own = {block: vars(block).get("forward") for block in outputs}
    for block, output in outputs.items():
        block.forward = lambda *args, output=output, **kwargs: output
    try:
        yield
    finally:
        for block, forward in own.items():
            del block.forward
            if forward is not None:
                block.forward = forward
