"""How a MoEfied model's FFNs run: masked (dense compute, then mask), or with only the selected experts computed.

Nothing of the model moves into new modules: the `forward` of an FFN's own Linears and activation is replaced on the
instance. The first Linear, which sees the FFN's input, computes the whole FFN; the others hand its output on.
"""

import importlib.util
import threading
from collections.abc import Callable

import torch
import torch.nn.functional as F
from moefy_ffn import BuildError, MoeFfn
from moefy_ffn.build import library
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from .limits import INNER_DROPOUT, LIMITS, device_of, largest_share
from .modeling.ffn_sites import FfnSite
from .modeling.routed_activation import RoutedActivation

logger = logging.get_logger("moefy_hf")

ACTIVATIONS = {  # class of the activation module -> the kernel's name
    "ReLU": "relu",
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "ReLUSquaredActivation": "relu_squared",
    "QuickGELUActivation": "quick_gelu",
}
MATRIX_ROUTERS = {  # routers whose scores are W x -> where W is; the kernel multiplies and selects itself
    "LinearRouter": "weight",
    "MeanGateRouter": "weight",
    "PriorApproximateRouter": "weight",
    "RandomRouter": "weight",
    "SigmoidRouter": "weight",
    "SimilarityRouter": "centres",
}
TRITON_EXTRA = "pip install 'moefy-hf[triton]'"
FEW_TOKENS = 4  # that indexing rows with torch pays for


def run_kernel(ffn: "SparseFfn", x: torch.Tensor) -> torch.Tensor:
    """x (..., d) -> (..., d), by the C++ kernel."""
    kernel = ffn.kernel()
    if kernel.routed:
        return kernel(x)[0]
    keep = ffn.keep(x)  # (..., E)
    return kernel(x, torch.arange(keep.shape[-1], dtype=torch.int32).where(keep, -1))[0]


def run_torch(ffn: "SparseFfn", x: torch.Tensor) -> torch.Tensor:
    """x (..., d) -> (..., d), by indexing the selected experts' rows, token by token."""
    weights, down_bias, act = ffn.site.weights(), ffn.site.down.bias, ffn.site.act
    tokens, keep = x.reshape(-1, x.shape[-1]), ffn.keep(x).flatten(0, -2)  # (T, d), (T, E)

    def rows(matrix: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """(f, ...) -> (K * m, ...)"""
        return matrix.unflatten(0, (act.num_experts, -1))[chosen].flatten(0, 1)

    def linear(token: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, chosen: torch.Tensor):
        return F.linear(token, rows(weight, chosen), None if bias is None else rows(bias, chosen))

    outputs = []
    for token, kept in zip(tokens, keep, strict=True):
        chosen = kept.nonzero().squeeze(-1)  # (K,)
        hidden = linear(token, weights.up, weights.up_bias, chosen)
        if weights.gate is None:
            hidden = weights.act(hidden)
        else:
            hidden = weights.act(linear(token, weights.gate, weights.gate_bias, chosen)) * hidden
        outputs.append(hidden @ rows(weights.down.t(), chosen))
    y = torch.stack(outputs)
    if act.compensation is not None:
        y = y + (~keep).to(y.dtype) @ ffn.means()
    return (y if down_bias is None else y + down_bias).view_as(x)


def experts_of(act: RoutedActivation, x: torch.Tensor) -> torch.Tensor:
    """x (..., d) -> (..., K) int32: the experts that run, the shared ones first, -1 in unused slots."""
    scores = act.router(x.detach())
    index, used = act.selection(act.router.strengths(scores) if act.selection.dynamic else scores)
    shared = torch.arange(act.shared, device=x.device).expand(*index.shape[:-1], -1)
    return torch.cat([shared, (index + act.shared).where(used, -1)], -1).int()


def run_triton(ffn: "SparseFfn", x: torch.Tensor) -> torch.Tensor:
    """x (..., d) -> (..., d), by the Triton kernels; with gradients."""
    from moefy_ffn.triton_ffn import triton_moe_ffn  # Triton comes with an extra

    weights, act, device = ffn.site.weights(), ffn.site.act, x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weights.up.dtype

    def cast(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.to(dtype)

    return triton_moe_ffn(
        x.to(dtype),
        weights.up.to(dtype),
        weights.down.t().to(dtype),
        experts_of(act, x),
        expert_size=act.expert_size,
        activation=ACTIVATIONS[type(weights.act).__name__],
        gate=cast(weights.gate),
        up_bias=cast(weights.up_bias),
        gate_bias=cast(weights.gate_bias),
        down_bias=cast(ffn.site.down.bias),
    )


IMPLEMENTATIONS: dict[str, Callable] = {"torch": run_torch, "cpu": run_kernel, "triton": run_triton}  # beside "masked"


class SparseFfn:
    """One FFN that computes only the selected experts, wherever a call allows it; its modules hold it."""

    def __init__(self, site: FfnSite, name: str, auto: bool, dropout: str | None):
        self.site, self.name, self.auto, self.dropout = site, name, auto, dropout
        self.calls = _Calls()
        self.prepared: tuple[tuple, MoeFfn] | None = None

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
        for module in {self.site.first, self.site.up, self.site.act, self.site.down}:
            vars(module).pop("forward", None)
        for linear in self.transposed():
            linear.weight.data = linear.weight.data.contiguous()

    def kernel(self) -> MoeFfn:
        """On the weights as they lie now: parameters may have been replaced since the last call, or the budget."""
        site, act = self.site, self.site.act
        weight = None if act.selection.dynamic else self.matrix()
        parameters = (*site.up.parameters(), *site.down.parameters(), *(site.gate.parameters() if site.gate else ()))
        state = (act.selection, type(act.router), *(p.data_ptr() for p in parameters), *self.versions())
        state = state if weight is None else (*state, weight.data_ptr())
        prepared = self.prepared  # read once: another thread may replace it
        if prepared is None or prepared[0] != state:
            weights = site.weights()
            kernel = MoeFfn(
                weights.up,
                weights.down.t(),
                k=None if weight is None else act.k,
                expert_size=act.expert_size,
                activation=ACTIVATIONS[type(weights.act).__name__],
                router=weight,
                shared=act.shared,
                gate=weights.gate,
                up_bias=weights.up_bias,
                gate_bias=weights.gate_bias,
                down_bias=site.down.bias,
                means=None if act.compensation is None else self.means(),
            )
            self.prepared = prepared = (state, kernel)
        return prepared[1]

    def matrix(self) -> torch.Tensor | None:
        """(E - S, d): the router, where it is one that the kernel multiplies by itself."""
        router = self.site.act.router
        weight = getattr(router, MATRIX_ROUTERS.get(type(router).__name__, ""), None)
        fits = weight is not None and weight.dtype in (torch.float32, self.site.up.weight.dtype)
        return weight if fits else None

    def versions(self) -> tuple[int, ...]:
        """Of the tensors that a kernel holds a product of: it is stale where they change."""
        act, down = self.site.act, self.site.down
        if act.compensation is None:
            return ()
        held = [each for each in (act.compensation, *down.parameters()) if not each.is_inference()]
        return (act.compensation.data_ptr(), *(each._version for each in held))

    @torch.no_grad()
    def means(self) -> torch.Tensor:
        """(E, d): what an expert that does not run adds to the output."""
        act, down = self.site.act, self.site.weights().down  # (d, f)
        products = (act.compensation.double() * down).unflatten(-1, (act.num_experts, -1))
        return products.sum(-1).t().to(down.dtype).contiguous()

    def share(self, x: torch.Tensor) -> float:
        """Of the experts, that these tokens compute."""
        act = self.site.act
        if act.selection.dynamic and x.device.type == "cpu":  # elsewhere the host would wait
            return float(self.keep(x).float().mean())
        return (act.k or 0) / act.num_experts  # unknown: sparse

    def keep(self, x: torch.Tensor) -> torch.Tensor:
        """(..., d) -> (..., E) bool: which experts run; the router scores a call's tokens once."""
        if self.calls.keep is None:
            self.calls.keep = self.site.act.keep(x)
        return self.calls.keep

    def transposed(self) -> list[nn.Module]:
        """The Linears whose weight has neurons along its second dimension."""
        linears = {self.site.first, self.site.up, self.site.down}
        return [linear for linear in linears if isinstance(linear, Conv1D) != (linear is self.site.down)]

    def first(self, x: torch.Tensor) -> torch.Tensor:
        first = self.site.first
        try:
            reason = self.reason(x)
            if reason is None:
                y = IMPLEMENTATIONS[self.name](self, x)
        finally:
            self.calls.keep = None
        if reason is not None:
            if not torch.compiler.is_compiling():
                (logger.info_once if self.auto else logger.warning_once)(f"FFNs run masked: {reason}")
            return type(first).forward(first, x)
        self.calls.sparse = True
        return torch.cat([y, torch.ones_like(y)], -1) if self.site.spec.parts == 2 else y

    def up(self, x: torch.Tensor) -> torch.Tensor | float:
        return 1.0 if self.calls.sparse else type(self.site.up).forward(self.site.up, x)

    def activation(self, h: torch.Tensor) -> torch.Tensor:
        act = self.site.act
        if not self.calls.sparse:
            return type(act).forward(act, h)
        act.observed.x = act.observed.kept = None
        return h

    def down(self, h: torch.Tensor) -> torch.Tensor:
        if not self.calls.sparse:
            return type(self.site.down).forward(self.site.down, h)
        self.calls.sparse = False
        return h

    def drops_neurons(self) -> bool:
        if self.dropout is None or not self.site.owner.training:
            return False
        dropout = getattr(self.site.owner, self.dropout)  # a module, or its probability
        return (dropout.p if isinstance(dropout, nn.Dropout) else dropout) > 0

    def reason(self, x: torch.Tensor) -> str | None:
        """Why this call is masked, if it is."""
        site, act, limits = self.site, self.site.act, LIMITS[self.name]
        if act.computes_all:
            return "all experts are selected"
        own = (p for linear in (site.first, site.up, site.down) for p in linear.parameters())
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
        before = [key for key in site.down._forward_pre_hooks if act.outlet is None or key != act.outlet.id]
        if act._forward_hooks or act._forward_pre_hooks or site.down._forward_hooks or before:
            return "something observes its neurons"
        if self.name == "torch" and x.numel() > FEW_TOKENS * x.shape[-1]:
            return "many tokens"
        if self.auto and self.share(x) > largest_share(x):
            return "dense is as fast for so many experts and tokens"
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


def set_implementation_(model: PreTrainedModel, name: str) -> None:
    """See `MoefiedMixin.set_moe_implementation`."""
    if name not in ("auto", "masked", *IMPLEMENTATIONS):
        raise ValueError(f"unknown implementation {name!r}; choose from auto, masked, {', '.join(IMPLEMENTATIONS)}")
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
        current = getattr(vars(site.first).get("forward"), "__self__", None)
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
    act = site.act.inner
    if type(act).__name__ not in ACTIVATIONS:
        return f"activation {type(act).__name__} is none of {', '.join(ACTIVATIONS)}"
    return None
