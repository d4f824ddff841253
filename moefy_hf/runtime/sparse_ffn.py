"""One FFN of a model, run by a backend wherever a call allows it.

Nothing of the model moves into new modules: the `forward` of an FFN's own Linears and activation is replaced on the
instance. The first Linear, which sees the FFN's input, computes the whole FFN, and `down` returns that. In between the
model's code gets numbers that mean nothing, in the shapes that it expects.
"""

from typing import Any, cast

import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ..discovery.parts import is_plain_linear
from ..modeling.ffn_sites import FfnSite
from ..modeling.moefied import base_layer
from ..modeling.routed_activation import PerThread
from .backend_base import Backend

logger = logging.get_logger("moefy_hf")

SHARDED = "FSDP owns its parameters, which are gathered only while they are used"
MANY_EXPERTS = "dense is as fast for so many experts and tokens"


class Call(PerThread):
    """What the backend computed in the call under way; one per thread, so that threads may share a model.

    Attributes:
        y: the FFN's output (..., d), from the first Linear to `down`; None where the call is masked.
    """

    y: torch.Tensor | None = None


class SparseFfn:
    """One FFN that computes only the selected experts, wherever a call allows it; its modules hold it.

    Args:
        backend: of this FFN.
        auto: whether calls that would not be faster are masked.
    """

    def __init__(self, backend: Backend, auto: bool = False):
        self.backend, self.auto = backend, auto
        self.site, self.act, self.linears = backend.site, backend.act, backend.linears
        spec = self.site.spec
        self.places = [self.place(path) for path in (*spec.linears, spec.act)]
        self.width = self.site.sizes[1]
        self.call = Call()

    def place(self, path: str) -> tuple[dict[str, Any], str, Any]:
        """Return where a part of the FFN is held, and what is there now."""
        parent, _, child = path.rpartition(".")
        children = self.site.owner.get_submodule(parent)._modules
        return children, child, children[child]

    def install_(self) -> None:
        """Take the place of the modules' `forward`, and lay matrices out with a row per neuron."""
        site = self.site
        for linear in self.transposed():  # the parameter is a transposed view, of the same values
            linear.weight.data = linear.weight.data.t().contiguous().t()
        site.first.forward = self.first
        site.act.forward = self.activation
        site.down.forward = self.down
        if site.gate is not None:
            site.up.forward = self.up

    def remove_(self) -> None:
        """Undo `install_`."""
        for module in {*self.linears, self.act}:
            vars(module).pop("forward", None)
        for linear in self.transposed():
            linear.weight.data = linear.weight.data.contiguous()

    def transposed(self) -> list[Any]:
        """Return the Linears whose weight has neurons along its second dimension."""
        down = self.linears[-1]
        return [linear for linear in self.linears if isinstance(linear, Conv1D) != (linear is down)]

    # What the modules' forward is

    def first(self, x: torch.Tensor) -> torch.Tensor:
        """(..., d) -> (..., f), or (..., 2f) of a fused Linear: placeholders, once the whole FFN is computed.

        Where the call is masked, the Linear's own output.
        """
        observed = self.act.observed
        self.call.y = None  # also where the last call was interrupted
        reason = self.reason(x)
        if reason is None:
            most = self.backend.largest_share(x, self.act.expert_size) if self.auto else None
            self.call.y = self.backend.run(x, most)
            if self.call.y is not None:
                observed.x, observed.kept, observed.computed = None, None, True
                return self.placeholders(self.site.spec.parts)
            reason = MANY_EXPERTS
        if not torch.compiler.is_compiling():
            (logger.info_once if self.auto else logger.warning_once)(f"FFNs run masked: {reason}")
        linear = self.linears[0]
        return type(linear).forward(linear, x)

    def up(self, x: torch.Tensor) -> torch.Tensor:
        """(..., d) -> (..., f): what a gated FFN multiplies; placeholders where `first` has computed its output."""
        up = self.linears[-2]
        return type(up).forward(up, x) if self.call.y is None else self.placeholders()

    def activation(self, h: torch.Tensor) -> torch.Tensor:
        """(..., f) -> (..., f): placeholders stay what they are."""
        act = self.act
        return type(act).forward(act, h) if self.call.y is None else h

    def down(self, h: torch.Tensor) -> torch.Tensor:
        """(..., f) -> (..., d): what `first` has computed."""
        down = self.linears[-1]
        y, self.call.y = self.call.y, None
        return type(down).forward(down, h) if y is None else y

    def placeholders(self, parts: int = 1) -> torch.Tensor:
        """Return (..., parts * f) zeros, of which nothing is made: one number in memory, so that they cost nothing."""
        y = cast(torch.Tensor, self.call.y)
        return y.new_zeros(()).expand(*y.shape[:-1], parts * self.width)

    # When it does not run

    def reason(self, x: torch.Tensor) -> str | None:
        """Return why this call is masked, if it is, whatever its number of experts."""
        act, down = self.act, self.linears[-1]
        if act.computes_all:
            return "all experts are selected"
        if is_traced(x):
            return "the call is traced"
        if is_sharded(self.linears[0]):
            return SHARDED
        if vars(act).get("soft") and act.weighs:  # code that came with an older checkpoint knows neither
            return "experts are weighted while they learn to be selected"
        if any(children[child] is not module for children, child, module in self.places):
            return "one of its modules was replaced or wrapped (set the implementation again)"
        if (refusal := self.backend.refusal(x)) is not None:
            return refusal
        if self.drops_neurons():
            return "dropout of its neurons is wanted"
        own = None if act.outlet is None else act.outlet.id  # fills in means, which backends do themselves
        others = any(key != own for key in down._forward_pre_hooks)
        if others or act._forward_hooks or act._forward_pre_hooks or down._forward_hooks:
            return "something observes its neurons"
        return None

    def drops_neurons(self) -> bool:
        """Whether dropout of the FFN's neurons is wanted, which only masked compute has."""
        name = self.site.spec.dropout
        if name is None or not self.site.owner.training:
            return False
        dropout = getattr(self.site.owner, name)  # a module, or its probability
        return (dropout.p if isinstance(dropout, nn.Dropout) else dropout) > 0


def sparse_ffn_of(site: FfnSite) -> SparseFfn | None:
    """Return what runs an FFN now, None where it is masked."""
    current = getattr(vars(base_layer(site.first)).get("forward"), "__self__", None)
    return current if isinstance(current, SparseFfn) else None


def misfit(site: FfnSite, backend: type[Backend]) -> str | None:
    """Return why an FFN cannot run by a backend, if it cannot."""
    if site.spec.together is not None:
        return f"its {site.spec.together} takes all neurons of a token together"
    for path in site.spec.linears:
        linear = site.owner.get_submodule(path)
        if is_sharded(linear):
            return f"{path}: {SHARDED}"
        own = getattr(vars(linear).get("forward"), "__self__", None)
        if not is_plain_linear(linear) or not isinstance(own, SparseFfn | None):
            return f"{path} is a {type(linear).__name__}, adapted, quantised or offloaded: only plain Linears can"
    return backend.misfit(site)


def is_traced(x: torch.Tensor) -> bool:
    """Whether operations on x are being recorded or transformed: what a kernel writes would be a constant there."""
    wrapped = type(x) not in (torch.Tensor, nn.Parameter) or torch._C._functorch.is_functorch_wrapped_tensor(x)
    return wrapped or torch.jit.is_tracing() or get_proxy_mode() is not None


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP (1 or 2) owns its parameters; they look like ordinary ones while they are gathered."""
    return getattr(module, "_is_fsdp_managed_module", False)
