"""Routers: FFN input x -> one score per expert. One class per method; `ROUTERS` is their registry.

A router is initialised from the weights of its experts, then, where `trainable`, fitted to `targets`: what each expert
does on each token. Weights are bare Parameters, so that no quantiser and no adapter meant for Linear layers takes
them.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from .router_base import Router, activation_mass, expert_centres, prior_affinity
from .router_pre_gated import PreGatedRouter
from .routers_from_weights import AnalyticRouter, MeanGateRouter, PartialInputRouter, SimilarityRouter

if TYPE_CHECKING:  # ffn_sites needs this file
    from .ffn_sites import FfnWeights


class LinearRouter(Router):
    """scores = W x: as good as the MLP on sparse models, cheaper, and the only kind that served MoE formats can
    hold."""

    def __init__(self, hidden_size: int, num_experts: int):
        super().__init__(hidden_size, num_experts)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))

    @torch.no_grad()
    def init_from_experts_(self, ffn: "FfnWeights") -> None:
        self.weight.copy_(expert_centres(ffn, self.num_experts))

    def score(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


class PriorApproximateRouter(LinearRouter):
    """scores = W x, fitted by FactorLLM's Prior-Approximate loss: the cross-entropy, which is a KL divergence up to a
    constant, between softmax(scores) and how well each expert alone stands for the FFN."""

    targets = staticmethod(prior_affinity)


class SigmoidRouter(LinearRouter):
    """strengths = sigmoid(W x), each expert judged by itself (LTE, section 4).

    Scores are W x: the same order, without the ties of saturated sigmoids. Fitted here layer by layer, to what an
    expert contributes relative to the token's strongest; the paper trains the whole model with it in two stages, which
    `moefy_hf.LearnedSelectionCallback` does.
    """

    def loss(self, scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(scores.float(), relative_to_largest(targets))

    def strengths(self, scores: torch.Tensor) -> torch.Tensor:
        return scores.float().sigmoid()


class LowRankRouter(Router):
    """scores = B A x through min(`rank`, d, E) dimensions: what a linear router of many experts, down to single
    neurons, can afford (the predictors of PowerInfer). Starts from the SVD of the expert centres."""

    settings = {"rank": 64}

    def __init__(self, hidden_size: int, num_experts: int, rank: int = settings["rank"]):
        super().__init__(hidden_size, num_experts)
        rank = min(rank, hidden_size, num_experts)
        self.proj_in = nn.Parameter(torch.empty(rank, hidden_size))
        self.proj_out = nn.Parameter(torch.empty(num_experts, rank))

    @torch.no_grad()
    def init_from_experts_(self, ffn: "FfnWeights") -> None:
        left, values, right = torch.linalg.svd(expert_centres(ffn, self.num_experts), full_matrices=False)
        scale = values[: len(self.proj_in)].sqrt()
        self.proj_in.copy_(scale[:, None] * right[: len(scale)])
        self.proj_out.copy_(left[:, : len(scale)] * scale)

    def score(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(x, self.proj_in), self.proj_out)


class MLPRouter(Router):
    """W2 tanh(W1 x / |x|), W1 starting at the expert centres and W2 at the identity (MoEfication, section 3.3)."""

    targets = staticmethod(activation_mass)

    def __init__(self, hidden_size: int, num_experts: int):
        super().__init__(hidden_size, num_experts)
        self.proj_in = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.proj_out = nn.Parameter(torch.empty(num_experts, num_experts))

    @torch.no_grad()
    def init_from_experts_(self, ffn: "FfnWeights") -> None:
        self.proj_in.copy_(expert_centres(ffn, self.num_experts))
        self.proj_out.copy_(torch.eye(self.num_experts))

    def loss(self, scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Binary cross-entropy, targets relative to each token's largest (the paper: to the batch's, which drifts)."""
        return F.binary_cross_entropy_with_logits(scores.float(), relative_to_largest(targets))

    def score(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(torch.tanh(F.linear(F.normalize(x, dim=-1), self.proj_in)), self.proj_out)


class NormRegressionRouter(Router):
    """scores = |W2 relu(W1 x + b1) + b2| through `hidden` dimensions: each expert's output norm itself, by squared
    error (D2DMoE, section 3.2)."""

    settings = {"hidden": 128}

    def __init__(self, hidden_size: int, num_experts: int, hidden: int = settings["hidden"]):
        super().__init__(hidden_size, num_experts)
        self.proj_in = nn.Parameter(torch.empty(hidden, hidden_size))
        self.bias_in = nn.Parameter(torch.empty(hidden))
        self.proj_out = nn.Parameter(torch.empty(num_experts, hidden))
        self.bias_out = nn.Parameter(torch.empty(num_experts))

    def score(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.relu(F.linear(x, self.proj_in, self.bias_in))
        return F.linear(hidden, self.proj_out, self.bias_out).abs()

    def loss(self, scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(scores.float(), targets.float())

    def strengths(self, scores: torch.Tensor) -> torch.Tensor:
        return scores


class ReluRmsNormRouter(Router):
    """strengths = relu(g * W x / rms(W x)): few experts for some tokens, many for others (BlockFFN, section 3.1).

    Scores are the same before the ReLU, which only matters to the order of experts that are off. Fitted here to the
    token's output norms at mean 0 and variance 1, so that the experts above the mean are on; the paper trains it with
    the model.
    """

    def __init__(self, hidden_size: int, num_experts: int):
        super().__init__(hidden_size, num_experts)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.gain = nn.Parameter(torch.empty(num_experts))

    @torch.no_grad()
    def init_from_experts_(self, ffn: "FfnWeights") -> None:
        self.weight.copy_(expert_centres(ffn, self.num_experts))
        self.gain.fill_(1)

    def score(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(F.linear(x, self.weight), self.gain.shape, self.gain, eps=1e-6)

    def loss(self, scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(scores.float(), F.layer_norm(targets.float(), targets.shape[-1:], eps=1e-12))

    def strengths(self, scores: torch.Tensor) -> torch.Tensor:
        return scores.relu()


class RandomRouter(Router):
    """A fixed random projection: the control, and SMoE-Dropout's router."""

    trainable = False

    def __init__(self, hidden_size: int, num_experts: int):
        super().__init__(hidden_size, num_experts)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))

    def score(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


def relative_to_largest(targets: torch.Tensor) -> torch.Tensor:
    """(T, E) -> (T, E) in [0, 1]"""
    return targets.float() / targets.float().amax(-1, keepdim=True).clamp_min(1e-6)


ROUTERS: dict[str, type[Router]] = {
    "linear": LinearRouter,
    "low_rank": LowRankRouter,
    "prior_approximate": PriorApproximateRouter,
    "sigmoid": SigmoidRouter,
    "mlp": MLPRouter,
    "norm_regression": NormRegressionRouter,
    "relu_rmsnorm": ReluRmsNormRouter,
    "pre_gated": PreGatedRouter,
    "analytic": AnalyticRouter,
    "mean_gate": MeanGateRouter,
    "partial_input": PartialInputRouter,
    "similarity": SimilarityRouter,
    "random": RandomRouter,
}


def router_class(name: Any, settings: Mapping[str, Any] | None = None) -> type[Router]:
    """The router of that name, which can be made with these settings.

    Raises:
        ValueError: an unknown name or setting (the valid ones are listed), a setting out of range, or settings that
            have no names.
    """
    if not isinstance(name, str) or name not in ROUTERS:
        raise ValueError(f"unknown router {name!r}; choose from {', '.join(ROUTERS)}")
    if not isinstance(settings, Mapping | None):
        raise ValueError(f"settings of a router are a mapping like {{'rank': 64}}, got {settings!r}")
    ROUTERS[name].check_settings(settings or {})
    return ROUTERS[name]
