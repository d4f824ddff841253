"""Routed FFNs as ONNX operators, in the graph that torch.onnx makes of a model.

While a model is traced, the first Linear of a routed FFN writes one operator that computes the whole FFN, and `down`
returns what that gave. Two operators are written:

- `com.microsoft::MoE` (`QMoE` for int8), which ONNX Runtime has. It weighs experts by a softmax of its logits. Chosen
  experts get 0 and all others `NEVER`, so that every chosen one weighs exactly 1 / k; `down` times k makes that 1.
  Where k depends on the token, the operator is asked for all experts. It passes over those that weigh 0, and what it
  gives is multiplied by the number of the others.
- `SPLIT`, which stands for a product per expert (`onnx_experts`). It is for activations that `MoE` does not have, and
  for experts of `LARGE` neurons and more: matrices that are known beforehand are packed once, which `MoE` does not do.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn

from ..discovery.parts import is_plain_linear
from ..discovery.probe import FUNCTIONS, function_of
from ..errors import MoefyError
from ..loading import MoefiedModel
from ..measure.contexts import evaluating
from ..modeling.ffn_sites import FfnSite
from ..modeling.routed_activation import chosen
from ..modeling.routers import handed_scores, router_facts
from ..runtime.backend_base import expert_means

SPLIT = "moefy_hf::Experts"
NEVER = -1e9  # the logit of an expert that does not run: exp of it is 0
LARGE = 128  # neurons; smaller experts are too many products
# transformers' name of the activation -> the operator's. Its GELU is the tanh form, which `gelu` is not
MOE_ACTIVATIONS = {"relu": "relu", "gelu_new": "gelu", "silu": "silu"}
MOE_GATED = {"silu": "swiglu"}  # on CPUs, with rows of gate and up in turns; it has no third matrix there


def operator_of(site: FfnSite, int8: bool = False) -> str:
    """Return which operator a routed FFN becomes: "MoE", "QMoE" or "Experts"."""
    known = MOE_ACTIVATIONS if site.weights().gate is None else MOE_GATED
    if site.act.expert_size >= LARGE or function_of(site.act.inner) not in known:
        return "Experts"
    return "QMoE" if int8 else "MoE"


def check_ffn(site: FfnSite) -> None:
    """Check that a routed FFN can be written.

    Raises:
        MoefyError: it cannot; says why.
    """
    if site.spec.together is not None:
        reason = f"its {site.spec.together} takes all neurons of a token together"
        raise MoefyError(f"{site.name} cannot become ONNX experts: {reason}")
    for path in site.spec.linears:
        linear = site.owner.get_submodule(path)
        if not is_plain_linear(linear):
            kind = type(linear).__name__
            raise MoefyError(f"{site.name}.{path} is a {kind}: merge adapters, and export before quantising")
    if function_of(site.act.inner) is None:
        kind, known = type(site.act.inner).__name__, ", ".join(FUNCTIONS)
        raise MoefyError(f"{site.name} has the activation {kind}; ONNX experts have {known}: relufy_ it first")
    if router_facts(site.act.router).serves_stack:
        kind = type(site.act.router).__name__
        raise MoefyError(f"a {kind} reads other layers, which no ONNX operator does: reroute_ with router='linear'")


class TracedFfn:
    """One routed FFN while its model is traced; it takes the place of its modules' `forward`.

    Args:
        site: the FFN.
        int8: whether its experts are 8-bit.
    """

    @torch.no_grad()
    def __init__(self, site: FfnSite, int8: bool):
        self.site, self.operator = site, operator_of(site, int8)
        self.bias = None if site.down.bias is None else site.down.bias.detach()
        self.means = None if site.act.compensation is None else expert_means(site)
        # made before tracing, which takes them for constants
        self.name, self.matrices, self.attributes = self.split(int8) if self.operator == "Experts" else self.moe()
        self.y: torch.Tensor | None = None

    def forwards(self) -> dict[nn.Module, Any]:
        """Return what the `forward` of each of its modules is meanwhile."""
        site = self.site
        found = {site.first: self.first, site.down: self.down, site.act: lambda h: h}
        return found if site.gate is None else found | {site.up: self.placeholders}

    def first(self, x: torch.Tensor) -> torch.Tensor:
        """(..., d) -> (..., f), or (..., 2f) of a fused Linear: placeholders; the FFN's output is kept for `down`."""
        act, tokens = self.site.act, x.reshape(-1, x.shape[-1])
        act.observed.x, act.observed.kept, act.observed.computed = None, None, True
        mask = chosen(handed_scores(act.router, tokens), act.router, act.selection, act.shared)  # (T, E)
        inputs = [tokens, mask if self.operator == "Experts" else torch.where(mask, 0.0, NEVER), *self.matrices]
        y = torch.onnx.ops.symbolic(self.name, inputs, self.attributes, dtype=x.dtype, shape=tokens.shape, version=1)
        if act.selection.dynamic and self.operator != "Experts":
            y = y * mask.sum(-1, keepdim=True)  # of experts that weigh 1 / k
        if self.means is not None:
            y = y + (~mask).to(y.dtype) @ self.means
        self.y = (y if self.bias is None else y + self.bias).reshape(x.shape)
        return self.placeholders(x, self.site.spec.parts)

    def placeholders(self, x: torch.Tensor, parts: int = 1) -> torch.Tensor:
        """(..., d) -> (..., parts * f): numbers of which nothing is made."""
        return x.new_zeros(*x.shape[:-1], parts * self.site.sizes[1])

    def down(self, h: torch.Tensor) -> torch.Tensor:
        """(..., f) -> (..., d): what the operator gives."""
        y, self.y = cast(torch.Tensor, self.y), None
        return y

    def experts(self, rows: torch.Tensor) -> torch.Tensor:
        """(f, ...) -> (E, m, ...)."""
        return rows.detach().unflatten(0, (self.site.act.num_experts, -1)).contiguous()

    def in_turns(self, rows: list[torch.Tensor]) -> torch.Tensor:
        """Up: (f, ...) -> (E, m, ...). Gate and up: (E, 2m, ...), a gate row, then the up row that it multiplies."""
        return torch.stack([self.experts(each) for each in rows], 2).flatten(1, 2).contiguous()

    def moe(self) -> tuple[str, list[torch.Tensor | None], dict[str, Any]]:
        """Return the name, the matrices and the attributes of ONNX Runtime's operator."""
        act, w, function = self.site.act, self.site.weights(), str(function_of(self.site.act.inner))
        k, scale = (act.num_experts, 1) if act.selection.dynamic else (int(act.k), int(act.k))
        attributes: dict[str, Any] = {"k": k, "normalize_routing_weights": 1}
        rows, biases = [w.up], [w.up_bias]
        if w.gate is None:
            attributes["activation_type"] = MOE_ACTIVATIONS[function]
        else:
            attributes |= {"activation_type": MOE_GATED[function], "swiglu_fusion": 1}
            attributes |= {"activation_alpha": 1.0, "activation_beta": 0.0}
            rows, biases = [w.gate, w.up], [w.gate_bias, w.up_bias]
        first = self.in_turns(rows)
        nothing = w.up.new_zeros(len(w.up))
        biased = any(each is not None for each in biases)
        bias = self.in_turns([nothing if each is None else each for each in biases]) if biased else None
        down = (self.experts(w.down.t()) * scale).transpose(1, 2).contiguous()  # (E, d, m)
        if self.operator == "MoE":
            return "com.microsoft::MoE", [first, bias, down], attributes
        matrices = [*int8_rows(first), bias, *int8_rows(down)]
        return "com.microsoft::QMoE", matrices, attributes | {"expert_weight_bits": 8}

    def split(self, int8: bool) -> tuple[str, list[torch.Tensor | None], dict[str, Any]]:
        """Return the name, the matrices and the attributes of what a product per expert is put in the place of."""
        w = self.site.weights()
        rows = [w.up, w.up_bias, w.gate, w.gate_bias, w.down.t()]
        matrices = [None if each is None else self.experts(each) for each in rows]
        return SPLIT, matrices, {"function": str(function_of(self.site.act.inner)), "int8": int(int8)}


def int8_rows(matrices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(E, r, c) -> 8-bit numbers around 128 (E, r, c), and a scale per row (E, r)."""
    scale = matrices.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    return ((matrices / scale).round() + 128).to(torch.uint8), scale.squeeze(-1)


@contextlib.contextmanager
def traced_as_operators(model: MoefiedModel, int8: bool) -> Iterator[dict[str, str]]:
    """Let the routed FFNs of a model be operators while it is traced.

    Yields:
        the operator of each FFN, by its name; FFNs that compute all their experts stay dense.
    """
    ffns = [TracedFfn(site, int8) for site in model.moe_sites() if not site.act.computes_all]
    forwards = {module: forward for ffn in ffns for module, forward in ffn.forwards().items()}
    before = {module: vars(module).pop("forward", None) for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        with evaluating(model), torch.no_grad():
            yield {ffn.site.key: ffn.operator for ffn in ffns}
    finally:
        for module, own in before.items():
            del module.forward
            if own is not None:
                module.forward = own
        for ffn in ffns:
            ffn.site.act.observed.computed = False
