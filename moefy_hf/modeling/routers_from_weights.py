"""Routers that are not fitted, and so need no data: made of the experts' own neurons, or random."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .ffn_weights import FfnWeights
from .router_base import Router, activation_mass, expert_centres, expert_keys


class SimilarityRouter(Router):
    """Cosine of x with the expert's centre (MoEfication, section 3.3: parameter centre)."""

    paper = "MoEfication, section 3.3"
    kernel_weights = ("centres",)
    trainable = False
    targets = staticmethod(activation_mass)

    def __init__(self, hidden_size: int, num_experts: int):
        super().__init__(hidden_size, num_experts)
        self.centres = nn.Parameter(torch.empty(num_experts, hidden_size))

    @torch.no_grad()
    def init_from_experts_(self, ffn: FfnWeights) -> None:
        self.centres.copy_(F.normalize(expert_centres(ffn, self.num_experts), dim=-1))

    def score(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.centres)  # the length of x does not change the order


class MeanGateRouter(Router):
    """scores = x . mean of the expert's gate rows, of its up rows in an ungated FFN (EMoE's avg-k gating)."""

    paper = "EMoE"
    kernel_weights = ("weight",)
    export_weight = "weight"
    trainable = False

    def __init__(self, hidden_size: int, num_experts: int):
        super().__init__(hidden_size, num_experts)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))

    @torch.no_grad()
    def init_from_experts_(self, ffn: FfnWeights) -> None:
        self.weight.copy_(expert_keys(ffn, self.num_experts).mean(1))

    def score(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


class AnalyticRouter(Router):
    """scores = |a_r|, the activation of the expert's representative neuron r: act(gate_r x) * (up_r x), in an ungated
    FFN act(up_r x) (CMoE's analytic router).

    r is the neuron whose normalised gate row (up row) is nearest to the mean of the expert's, for a converted model
    keeps no marks of calibration tokens. The paper ranks by a_r as it is; a neuron that is strongly negative
    contributes as much as one that is positive, hence |.|.

    Args:
        act: the FFN's activation, shared with it: it has no weights, so that copied rows are all there is to save.
        gated: whether the FFN has a gate.
        bias: whether its neurons have biases.
    """

    paper = "CMoE"
    trainable = False

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        act: nn.Module | None = None,
        gated: bool = True,
        bias: bool = False,
    ):
        super().__init__(hidden_size, num_experts)
        self.ffn_act = (act or nn.SiLU(),)  # in a tuple: no child of this module

        def rows(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_experts, *shape))

        self.up, self.up_bias = rows(hidden_size), rows() if bias else None
        self.gate, self.gate_bias = rows(hidden_size) if gated else None, rows() if gated and bias else None

    @classmethod
    def of(cls, ffn: FfnWeights, num_experts: int, **settings: Any) -> "AnalyticRouter":
        return cls(ffn.down.shape[0], num_experts, ffn.act, ffn.gate is not None, ffn.up_bias is not None)

    @torch.no_grad()
    def init_from_experts_(self, ffn: FfnWeights) -> None:
        keys = F.normalize(expert_keys(ffn, self.num_experts), dim=-1)  # (E, m, d)
        nearest = (keys - keys.mean(1, keepdim=True)).square().sum(-1).argmin(1)  # (E,)
        neurons = nearest + torch.arange(self.num_experts, device=nearest.device) * keys.shape[1]
        for own, rows in (
            (self.up, ffn.up),
            (self.up_bias, ffn.up_bias),
            (self.gate, ffn.gate),
            (self.gate_bias, ffn.gate_bias),
        ):
            if own is not None and rows is not None:
                own.copy_(rows[neurons])

    def score(self, x: torch.Tensor) -> torch.Tensor:
        (act,) = self.ffn_act
        up = F.linear(x, self.up, self.up_bias)
        return (act(up) if self.gate is None else act(F.linear(x, self.gate, self.gate_bias)) * up).abs()

    def strengths(self, scores: torch.Tensor) -> torch.Tensor:
        return scores


class PartialInputRouter(Router):
    """scores = the norm of what each expert's neurons would give if the FFN read only the larger entries of x, a share
    `inputs` of them, and zero for the others.

    That the small entries of a gated FFN's input hardly matter is TEAL's finding, which leaves them out; here they
    only do not choose, for the experts that run read the other entries, too. Neurons are taken as orthogonal in the
    output (their norms add in squares). No weights of its own, and no gradient: it reads those of the FFN, without
    adapters.
    """

    trainable = False
    reuses_expert_compute = True
    settings = {"inputs": 0.4}  # near the best for SwiGLU at half the FLOPs; reading more leaves less for the experts

    def __init__(self, hidden_size: int, num_experts: int, inputs: float = settings["inputs"]):
        super().__init__(hidden_size, num_experts)
        self.inputs = max(1, round(inputs * hidden_size))  # entries of x that are read
        self.ffn: tuple[Callable[[], FfnWeights], ...] = ()  # in a tuple: no child of this module
        self.shared = 0

    def read_from_(self, ffn: Callable[[], FfnWeights], shared: int) -> None:
        self.ffn, self.shared = (ffn,), shared

    def weights(self) -> FfnWeights:
        if not self.ffn:
            raise RuntimeError("this router runs part of an FFN and was given none: read_from_ comes first")
        ffn = self.ffn[0]()
        if ffn.up.dtype not in (torch.float32, torch.bfloat16, torch.float16):  # integers would be scores of anything
            raise RuntimeError(f"this router runs part of its FFN, whose weights are {ffn.up.dtype}: quantised?")
        if any(each is not None and each.is_meta for each in (ffn.up, ffn.gate, ffn.down)):
            raise RuntimeError(
                "a partial_input router runs part of its FFN, whose weights are not in this process: give the model "
                'another router, moefy_hf.reroute_(model, "linear", profile)'
            )
        return ffn

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.score(x.float())

    def score(self, x: torch.Tensor) -> torch.Tensor:
        ffn, largest = self.weights(), x.abs().topk(self.inputs, dim=-1, sorted=False).indices
        neurons = ffn.neurons(torch.zeros_like(x).scatter(-1, largest, x.gather(-1, largest))).float()  # (..., f)
        squares = neurons.square() * ffn.down.float().square().sum(0)
        experts = squares.unflatten(-1, (self.shared + self.num_experts, -1))[..., self.shared :, :]
        return experts.sum(-1).sqrt()

    def strengths(self, scores: torch.Tensor) -> torch.Tensor:
        return scores

    def flops(self) -> int:
        ffn = self.weights()
        neurons = ffn.down.shape[1] * self.num_experts // (self.shared + self.num_experts)
        return 2 * self.inputs * neurons * (1 if ffn.gate is None else 2)


class RandomRouter(Router):
    """A fixed random projection: the control, and SMoE-Dropout's router."""

    paper = "SMoE-Dropout"
    kernel_weights = ("weight",)
    trainable = False

    def __init__(self, hidden_size: int, num_experts: int):
        super().__init__(hidden_size, num_experts)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))

    def score(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)
