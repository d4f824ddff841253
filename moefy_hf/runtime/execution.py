"""How a MoEfied model's FFNs run: masked (dense compute, then mask), or with only the selected experts computed.

Nothing of the model moves into new modules: the `forward` of an FFN's own Linears and activation is replaced on the
instance. The first Linear, which sees the FFN's input, computes the whole FFN; the others hand its output on.
"""

import importlib.util
import threading
from typing import Any

import torch
from moefy_ffn import BuildError, MoeFfn
from moefy_ffn.build import library
from torch import nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ..loading import check_code
from ..modeling.ffn_sites import FfnSite
from ..modeling.moefied import base_layer
from ..modeling.routers import facts_of
from .backends import ACTIVATIONS, IMPLEMENTATIONS, KERNEL_ROUTERS, KERNEL_SELECTIONS
from .limits import INNER_DROPOUT, LIMITS, device_of, largest_share

logger = logging.get_logger("moefy_hf")

TRITON_EXTRA = "pip install 'moefy-hf[triton]'"
FEW_TOKENS = 4  # that indexing rows with torch pays for
SHARDED = "FSDP owns its parameters, which are gathered only while they are used"
MANY_EXPERTS = "dense is as fast for so many experts and tokens"


class SparseFfn:
    """One FFN that computes only the selected experts, wherever a call allows it; its modules hold it."""

    def __init__(self, site: FfnSite, name: str, auto: bool, dropout: str | None):
        self.site, self.name, self.auto, self.dropout = site, name, auto, dropout
        spec = site.spec
        paths = [path for path in (spec.gate, spec.up, spec.down) if path]
        self.linears: list[Any] = [site.owner.get_submodule(path) for path in paths]  # found once: decoding is hurried
        self.linear, self.act = site.first, site.act
        self.places = [self.place(path) for path in (*paths, spec.act)]
        self.calls = _Calls()
        self.prepared: tuple[tuple, MoeFfn] | None = None

    def place(self, path: str) -> tuple[dict[str, Any], str, Any]:
        """Where a part of the FFN is held, and what is there now."""
        parent, _, child = path.rpartition(".")
        held = self.site.owner.get_submodule(parent)._modules
        return held, child, held[child]

    def __getstate__(self) -> dict:
        return vars(self) | {"prepared": None}  # a copy has weights of its own

    def install_(self) -> None:
        site = self.site
        for linear in self.transposed():  # a row per neuron; for the same values, the parameter is a transposed view
            linear.weight.data = linear.weight.data.t().contiguous().t()
        site.first.forward = self.first
        site.act.forward = self.activation
        site.down.forward = self.down
        if site.gate is not None:
            site.up.forward = self.up

    def remove_(self) -> None:
        for module in {*self.linears, self.act}:
            vars(module).pop("forward", None)
        for linear in self.transposed():
            linear.weight.data = linear.weight.data.contiguous()

    def kernel(self) -> MoeFfn:
        """On the weights as they lie now: parameters may have been replaced since the last call, or the budget."""
        site, act = self.site, self.act
        matrices = self.matrices()
        parameters = (each for linear in self.linears for each in (linear.weight, linear.bias) if each is not None)
        state = (act.selection, type(act.router), *(each.data_ptr() for each in parameters), *self.versions())
        state = (*state, *((each.data_ptr(), each.shape) for each in matrices.values()))
        prepared = self.prepared  # read once: another thread may replace it
        if prepared is None or prepared[0] != state:
            weights = site.weights()
            kernel = MoeFfn(
                weights.up,
                weights.down.t(),
                expert_size=act.expert_size,
                activation=ACTIVATIONS[type(weights.act).__name__],
                shared=act.shared,
                gate=weights.gate,
                up_bias=weights.up_bias,
                gate_bias=weights.gate_bias,
                down_bias=site.down.bias,
                means=None if act.compensation is None else self.means(),
                **self.routing(matrices),
            )
            self.prepared = prepared = (state, kernel)
        return prepared[1]

    def matrices(self) -> dict[str, torch.Tensor]:
        """The router's, where it is one that the kernel runs by itself, and selects by; none where hooks want its
        scores, as those do that count experts."""
        router, selection = self.act.router, type(self.act.selection).__name__
        known = KERNEL_ROUTERS.get(type(router).__name__)
        if known is None or selection not in KERNEL_SELECTIONS or router._forward_hooks or router._forward_pre_hooks:
            return {}
        names = {"router": known.weight} | ({} if known.before is None else {"router_in": known.before})
        held = ((name, getattr(router, own, None)) for name, own in names.items())  # older code may have other names
        found = {name: each for name, each in held if each is not None and each.is_contiguous()}
        dtypes = {each.dtype for each in found.values()}
        fits = len(found) == len(names) and dtypes in ({torch.float32}, {self.linear.weight.dtype})
        return found if fits else {}

    def routing(self, matrices: dict[str, torch.Tensor]) -> dict[str, Any]:
        """What the kernel is told of the router and the selection."""
        act = self.act
        if not matrices:
            return {}
        found = matrices | {"selection": KERNEL_SELECTIONS[type(act.selection).__name__]}
        if not act.selection.dynamic:
            return found | {"k": act.k}
        strengths = KERNEL_ROUTERS[type(act.router).__name__].strengths
        return found | {"setting": act.selection.setting, "strengths": strengths}

    def versions(self) -> tuple[int, ...]:
        """Of the tensors that a kernel holds a product of: it is stale where they change."""
        act = self.act
        if act.compensation is None:
            return ()
        held = [each for each in (act.compensation, self.linears[-1].weight) if not each.is_inference()]
        return (act.compensation.data_ptr(), *(each._version for each in held))

    @torch.no_grad()
    def means(self) -> torch.Tensor:
        """(E, d): what an expert that does not run adds to the output."""
        act, down = self.act, self.site.weights().down  # (d, f)
        products = (act.compensation.double() * down).unflatten(-1, (act.num_experts, -1))
        return products.sum(-1).t().to(down.dtype).contiguous()

    def share(self, x: torch.Tensor) -> float:
        """Of the experts, that these tokens compute; 0 where `run_kernel` finds out."""
        act = self.act
        if act.selection.dynamic and x.device.type == "cpu":  # elsewhere the host would wait
            if self.name == "cpu" and self.matrices():
                return 0.0
            return float(self.keep(x).float().mean())
        return (act.k or 0) / act.num_experts  # unknown: sparse

    def keep(self, x: torch.Tensor) -> torch.Tensor:
        """(..., d) -> (..., E) bool: which experts run; the router scores a call's tokens once."""
        if self.calls.keep is None:
            self.calls.keep = self.act.keep(x)
        return self.calls.keep

    def transposed(self) -> list[nn.Module]:
        """The Linears whose weight has neurons along its second dimension."""
        down = self.linears[-1]
        return [linear for linear in self.linears if isinstance(linear, Conv1D) != (linear is down)]

    def first(self, x: torch.Tensor) -> torch.Tensor:
        try:
            reason = self.reason(x)
            if reason is None and (y := IMPLEMENTATIONS[self.name](self, x)) is None:
                reason = MANY_EXPERTS
        finally:
            self.calls.keep, self.calls.sparse = None, False  # also where the last call was interrupted
        if reason is not None:
            if not torch.compiler.is_compiling():
                (logger.info_once if self.auto else logger.warning_once)(f"FFNs run masked: {reason}")
            return type(self.linear).forward(self.linear, x)
        self.calls.sparse = True
        return torch.cat([y, torch.ones_like(y)], -1) if self.site.spec.parts == 2 else y

    def up(self, x: torch.Tensor) -> torch.Tensor | float:
        up = self.linears[-2]
        return 1.0 if self.calls.sparse else type(up).forward(up, x)

    def activation(self, h: torch.Tensor) -> torch.Tensor:
        act = self.act
        if not self.calls.sparse:
            return type(act).forward(act, h)
        act.observed.x = act.observed.kept = None
        return h

    def down(self, h: torch.Tensor) -> torch.Tensor:
        down = self.linears[-1]
        if not self.calls.sparse:
            return type(down).forward(down, h)
        self.calls.sparse = False
        return h

    def drops_neurons(self) -> bool:
        if self.dropout is None or not self.site.owner.training:
            return False
        dropout = getattr(self.site.owner, self.dropout)  # a module, or its probability
        return (dropout.p if isinstance(dropout, nn.Dropout) else dropout) > 0

    def reason(self, x: torch.Tensor) -> str | None:
        """Why this call is masked, if it is."""
        act, down, limits = self.act, self.linears[-1], LIMITS[self.name]
        if act.computes_all:
            return "all experts are selected"
        if traced(x):
            return "the call is traced"
        if is_sharded(self.linear):
            return SHARDED
        if vars(act).get("soft") and act.weighs:  # code that came with an older checkpoint knows neither
            return "experts are weighted while they learn to be selected"
        if any(held[child] is not module for held, child, module in self.places):
            return "one of its modules was replaced or wrapped (set the implementation again)"
        own = (p for linear in self.linears for p in linear.parameters())
        wanted = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in own))
        if wanted and not limits.gradients:
            return "gradients are wanted (use torch.no_grad or torch.inference_mode)"
        autocast = torch.is_autocast_enabled(x.device.type)
        if x.device.type != device_of(self.name) or x.dtype not in limits.dtypes or torch.compiler.is_compiling():
            return f"it is not plain {limits.names} on {device_of(self.name)}"
        if autocast and not (limits.autocast and torch.get_autocast_dtype(x.device.type) in limits.dtypes):
            return "autocast wants another dtype"
        if self.drops_neurons():
            return "dropout of its neurons is wanted"
        if act.compensation is not None and not limits.compensation:
            return "experts that do not run contribute their mean"
        before = [key for key in down._forward_pre_hooks if act.outlet is None or key != act.outlet.id]
        if act._forward_hooks or act._forward_pre_hooks or down._forward_hooks or before:
            return "something observes its neurons"
        if self.name == "torch" and x.numel() > FEW_TOKENS * x.shape[-1]:
            return "many tokens"
        if self.auto and self.share(x) > largest_share(self.name, x, act.expert_size):
            return MANY_EXPERTS
        return None


class _Calls(threading.local):
    """Whether the call under way is sparse, and which experts run for its tokens; one per thread, so that threads may
    share a model."""

    sparse = False
    keep: torch.Tensor | None = None

    def __deepcopy__(self, memo):
        return _Calls()

    def __reduce__(self):
        return _Calls, ()


def traced(x: torch.Tensor) -> bool:
    """Whether operations on x are being recorded or transformed: what a kernel writes would be a constant there."""
    wrapped = type(x) not in (torch.Tensor, nn.Parameter) or torch._C._functorch.is_functorch_wrapped_tensor(x)
    return wrapped or torch.jit.is_tracing() or get_proxy_mode() is not None


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP (1 or 2) owns its parameters; they look like ordinary ones while they are gathered."""
    return getattr(module, "_is_fsdp_managed_module", False)


def set_implementation_(model: PreTrainedModel, name: str) -> None:
    """See `MoefiedMixin.set_moe_implementation`."""
    if name not in ("auto", "masked", *IMPLEMENTATIONS):
        raise ValueError(f"unknown implementation {name!r}; choose from auto, masked, {', '.join(IMPLEMENTATIONS)}")
    check_code(model)
    sites = model.moe_sites()
    chosen = best_for(model.device.type) if name == "auto" else name
    if name == "cpu":
        library()
    elif name == "triton" and importlib.util.find_spec("triton") is None:
        raise ImportError(f"implementation 'triton' needs Triton: {TRITON_EXTRA}")
    unfit = []
    if chosen != "masked":
        unfit = [f"{site.name}: {found}" for site in sites if (found := misfit(site, chosen)) is not None]
    if unfit and name == "auto":
        logger.warning_once(f"{len(unfit)} of {len(sites)} FFNs run masked: {unfit[0]}")
    elif unfit:
        raise ValueError(f"implementation {name!r} cannot run {unfit[0]}")
    for site in sites:
        current = getattr(vars(base_layer(site.first)).get("forward"), "__self__", None)
        if isinstance(current, SparseFfn):
            current.remove_()
        if chosen != "masked" and misfit(site, chosen) is None:
            SparseFfn(site, chosen, name == "auto", INNER_DROPOUT.get(model.config.model_type)).install_()


def best_for(device: str) -> str:
    """What "auto" is on a type of device."""
    if device == "cuda":
        if importlib.util.find_spec("triton") is not None:
            return "triton"
        logger.warning_once(f"FFNs run masked: there is no Triton ({TRITON_EXTRA})")
        return "masked"
    try:
        library()
    except BuildError as error:
        logger.warning_once(f"experts run by torch, slower than compiled: {error}")
        return "torch"
    return "cpu"


def misfit(site: FfnSite, name: str) -> str | None:
    """Why an FFN cannot run by an implementation, if it cannot."""
    limits, device, dtype = LIMITS[name], device_of(name), site.down.weight.dtype
    for path in filter(None, (site.spec.gate, site.spec.up, site.spec.down)):
        linear = site.owner.get_submodule(path)
        if is_sharded(linear):
            return f"{path}: {SHARDED}"
        own = vars(linear).get("forward")
        plain = type(linear) in (nn.Linear, Conv1D) or type(linear).__name__ == "FalconLinear"
        if not plain or not isinstance(getattr(own, "__self__", None), SparseFfn | None):
            return f"{path} is a {type(linear).__name__}, adapted, quantised or offloaded: only plain Linears can"
        for parameter in linear.parameters():
            if type(parameter) is not nn.Parameter or parameter.device.type != device:
                where = "the CPU" if device == "cpu" else device
                return f"{path} has a {type(parameter).__name__} on {parameter.device}: only plain ones on {where} can"
            if parameter.dtype not in limits.dtypes:
                return f"{path} is {parameter.dtype}: only {limits.names} can"
            if parameter.dtype != dtype:
                return f"{path} is {parameter.dtype}, {site.spec.down} {dtype}: only one dtype can"
    if facts_of(site.act.router).reuses_expert_compute:
        return f"its {type(site.act.router).__name__} computes part of each neuron, which no kernel goes on from"
    act = site.act.inner
    if type(act).__name__ not in ACTIVATIONS:
        return f"activation {type(act).__name__} is none of {', '.join(ACTIVATIONS)}"
    return None
