"""What backends have in common. A backend computes the selected experts of an FFN alone, for tokens x."""

from typing import Any, ClassVar

import torch

from ..discovery.probe import function_of
from ..modeling.ffn_sites import FfnSite
from ..modeling.routers import router_facts

ACTIVATIONS = {  # transformers' name of the activation -> the kernels'
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "silu": "silu",
    "relu2": "relu_squared",
    "quick_gelu": "quick_gelu",
}


def kernel_activation(act: torch.nn.Module) -> str:
    """Return the kernels' name of an activation, by its values; "" where they do not have it."""
    return ACTIVATIONS.get(function_of(act) or "", "")


class Backend:
    """The base class: an object runs one FFN, whose modules and weights stay where they are.

    A backend is one subclass and one line of `BACKENDS`. It says what it can run (the class attributes, `misfit` for
    an FFN, `refusal` for a call), what it makes of an FFN once (`prepare`, again where `state` has changed), and how
    it runs (`compute`).

    Attributes:
        name: in `set_moe_implementation`.
        device: the type of device that it runs on.
        dtypes: of weights and tokens.
        gradients: whether gradients may be wanted of a call.
        autocast: whether a call may be in autocast, to one of `dtypes`.
        compensation: whether experts that do not run may contribute their mean.
        most_tokens: calls of more tokens are left to dense; None: any number.
        counts_experts: whether `compute` finds out how many experts a dynamic selection takes before it computes any.
    """

    name: ClassVar[str]
    device: ClassVar[str] = "cpu"
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32, torch.bfloat16)
    gradients: ClassVar[bool] = False
    autocast: ClassVar[bool] = False
    compensation: ClassVar[bool] = True
    most_tokens: ClassVar[int | None] = None
    counts_experts: ClassVar[bool] = True

    def __init__(self, site: FfnSite):
        self.site, self.act = site, site.act
        # found once: decoding is hurried
        self.linears: list[Any] = [site.owner.get_submodule(path) for path in site.spec.linears]
        self.activation = kernel_activation(site.act.inner)
        self.cache: tuple[tuple, Any] | None = None

    def __getstate__(self) -> dict:
        return vars(self) | {"cache": None}  # a copy has weights of its own

    # Whether it can run

    @classmethod
    def require(cls) -> None:
        """Make sure that it can run here.

        Raises:
            ImportError: something has to be installed.
            BuildError: it cannot be compiled.
        """

    @classmethod
    def unavailable(cls) -> str | None:
        """Return why it cannot run here, if it cannot; nothing is compiled for that."""
        return None

    @classmethod
    def device_type(cls) -> str:
        """Return the type of device that it runs on in this process."""
        return cls.device

    @classmethod
    def dtype_names(cls) -> str:
        """Return "float32 or bfloat16"."""
        return " or ".join(str(dtype).removeprefix("torch.") for dtype in cls.dtypes)

    @classmethod
    def misfit(cls, site: FfnSite) -> str | None:
        """Return why an FFN of plain Linears cannot run by this backend, if it cannot."""
        device, dtype = cls.device_type(), site.down.weight.dtype
        for path in site.spec.linears:
            for parameter in site.owner.get_submodule(path).parameters():
                if type(parameter) is not torch.nn.Parameter or parameter.device.type != device:
                    where = "the CPU" if device == "cpu" else device
                    kind = type(parameter).__name__
                    return f"{path} has a {kind} on {parameter.device}: only plain ones on {where} can"
                if parameter.dtype not in cls.dtypes:
                    return f"{path} is {parameter.dtype}: only {cls.dtype_names()} can"
                if parameter.dtype != dtype:
                    return f"{path} is {parameter.dtype}, {site.spec.down} {dtype}: only one dtype can"
        if router_facts(site.act.router).reuses_expert_compute:
            return f"its {type(site.act.router).__name__} computes part of each neuron, which no kernel goes on from"
        act = site.act.inner
        if not kernel_activation(act):
            return f"activation {type(act).__name__} is none of {', '.join(ACTIVATIONS)}"
        return None

    def refusal(self, x: torch.Tensor) -> str | None:
        """Return why a call on x (..., d) cannot run by this backend, if it cannot."""
        if not self.gradients and torch.is_grad_enabled():
            parameters = (parameter for linear in self.linears for parameter in linear.parameters())
            if x.requires_grad or any(parameter.requires_grad for parameter in parameters):
                return "gradients are wanted (use torch.no_grad or torch.inference_mode)"
        device = x.device.type
        if device != self.device_type() or x.dtype not in self.dtypes or torch.compiler.is_compiling():
            return f"it is not plain {self.dtype_names()} on {self.device_type()}"
        if torch.is_autocast_enabled(device):
            if not self.autocast or torch.get_autocast_dtype(device) not in self.dtypes:
                return "autocast wants another dtype"
        if self.act.compensation is not None and not self.compensation:
            return "experts that do not run contribute their mean"
        if self.most_tokens is not None and x.numel() > self.most_tokens * x.shape[-1]:
            return "many tokens"
        return None

    @classmethod
    def largest_share(cls, x: torch.Tensor, expert_size: int) -> float:
        """Return the share of the experts above which dense is as fast, for tokens x (..., d)."""
        raise NotImplementedError

    # How it runs

    def state(self) -> tuple:
        """Return all that `prepare` depends on, as values that compare by ==."""
        return ()

    def prepare(self) -> Any:
        """Make what `compute` needs beside the weights; kept until `state` changes."""
        return None

    def prepared(self) -> Any:
        """Return what `prepare` makes of the FFN as it is now: weights, router or budget may have been replaced."""
        state, cache = self.state(), self.cache  # read once: another thread may replace it
        if cache is None or cache[0] != state:
            self.cache = cache = (state, self.prepare())
        return cache[1]

    def run(self, x: torch.Tensor, most: float | None = None) -> torch.Tensor | None:
        """x (..., d) -> (..., d): the FFN's output, of the selected experts.

        Args:
            most: a share of the experts; None is returned where the tokens select more, on average.
        """
        if most is not None and not (self.counts_experts and self.act.selection.dynamic):
            if (self.act.k or 0) / self.act.num_experts > most:  # where nobody has measured k, it runs
                return None
            most = None
        return self.compute(x, most)

    def compute(self, x: torch.Tensor, most: float | None) -> torch.Tensor | None:
        """As `run`; `most` is given only where the selection is dynamic and `counts_experts`."""
        raise NotImplementedError


@torch.no_grad()
def expert_means(site: FfnSite) -> torch.Tensor:
    """Return (E, d): what each expert adds to the output of a token that does not run it (see `compensate_`)."""
    act, down = site.act, site.weights().down  # (d, f)
    products = (act.compensation.double() * down).unflatten(-1, (act.num_experts, -1))
    return products.sum(-1).t().to(down.dtype).contiguous()
