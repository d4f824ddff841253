"""Routers that are fitted to calibration data, from a start in the weights of their experts.

Weights are bare Parameters, so that no quantiser and no adapter meant for Linear layers takes them.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .ffn_weights import FfnWeights
from .router_base import Router, activation_mass, expert_centres, prior_affinity


class LinearRouter(Router):
    """scores = W x: as good as the MLP on sparse models, cheaper, and what served MoEs have."""

    kernel_weights = ("weight",)
    export_weight = "weight"

    def __init__(self, hidden_size: int, num_experts: int):
        super().__init__(hidden_size, num_experts)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))

    @torch.no_grad()
    def init_from_experts_(self, ffn: FfnWeights) -> None:
        self.weight.copy_(expert_centres(ffn, self.num_experts))

    def score(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


class PriorApproximateRouter(LinearRouter):
    """scores = W x, fitted by FactorLLM's Prior-Approximate loss.

    It is the cross-entropy, a KL divergence up to a constant, between softmax(scores) and how well each expert alone
    stands for the FFN.
    """

    paper = "FactorLLM"
    targets = staticmethod(prior_affinity)


class SigmoidRouter(LinearRouter):
    """Routing weights are sigmoid(W x), each expert judged by itself (LTE, section 4).

    Scores are W x: the same order, without the ties of saturated sigmoids. It is fitted here layer by layer, to what
    an expert contributes relative to the token's strongest. The paper trains the whole model with it in two stages,
    which `moefy_hf.LearnedSelectionCallback` does.
    """

    paper = "LTE, section 4"
    kernel_weights = ("weight",)
    kernel_strengths = "sigmoid"
    export_weight = "weight"

    def loss(self, scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(scores.float(), relative_to_largest(targets))

    def strengths(self, scores: torch.Tensor) -> torch.Tensor:
        return scores.float().sigmoid()


class LowRankRouter(Router):
    """scores = B A x through min(`rank`, d, E) dimensions (the predictors of PowerInfer).

    That is what a linear router of many experts, down to single neurons, can afford. It starts from the SVD of the
    expert centres.
    """

    paper = "PowerInfer"
    kernel_weights = ("proj_in", "proj_out")
    settings = {"rank": 64}

    def __init__(self, hidden_size: int, num_experts: int, rank: int = settings["rank"]):
        super().__init__(hidden_size, num_experts)
        rank = min(rank, hidden_size, num_experts)
        self.proj_in = nn.Parameter(torch.empty(rank, hidden_size))
        self.proj_out = nn.Parameter(torch.empty(num_experts, rank))

    @torch.no_grad()
    def init_from_experts_(self, ffn: FfnWeights) -> None:
        left, values, right = torch.linalg.svd(expert_centres(ffn, self.num_experts), full_matrices=False)
        scale = values[: len(self.proj_in)].sqrt()
        self.proj_in.copy_(scale[:, None] * right[: len(scale)])
        self.proj_out.copy_(left[:, : len(scale)] * scale)

    def score(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(x, self.proj_in), self.proj_out)


class MLPRouter(Router):
    """W2 tanh(W1 x / |x|), W1 starting at the expert centres and W2 at the identity (MoEfication, section 3.3)."""

    paper = "MoEfication, section 3.3"
    targets = staticmethod(activation_mass)

    def __init__(self, hidden_size: int, num_experts: int):
        super().__init__(hidden_size, num_experts)
        self.proj_in = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.proj_out = nn.Parameter(torch.empty(num_experts, num_experts))

    @torch.no_grad()
    def init_from_experts_(self, ffn: FfnWeights) -> None:
        self.proj_in.copy_(expert_centres(ffn, self.num_experts))
        self.proj_out.copy_(torch.eye(self.num_experts))

    def loss(self, scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Binary cross-entropy, targets relative to each token's largest (the paper: to the batch's, which drifts)."""
        return F.binary_cross_entropy_with_logits(scores.float(), relative_to_largest(targets))

    def score(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(torch.tanh(F.linear(F.normalize(x, dim=-1), self.proj_in)), self.proj_out)


class NormRegressionRouter(Router):
    """scores = |W2 relu(W1 x + b1) + b2| through `hidden` dimensions (D2DMoE, section 3.2).

    They are fitted to each expert's output norm itself, by squared error.
    """

    paper = "D2DMoE, section 3.2"
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
    """Routing weights are relu(g * W x / rms(W x)): few experts for some tokens, many for others (BlockFFN, section
    3.1).

    Scores are the same before the ReLU, which only matters to the order of experts that are off. It is fitted here to
    the token's output norms at mean 0 and variance 1, so that the experts above the mean are on. The paper trains it
    with the model.
    """

    paper = "BlockFFN, section 3.1"

    def __init__(self, hidden_size: int, num_experts: int):
        super().__init__(hidden_size, num_experts)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.gain = nn.Parameter(torch.empty(num_experts))

    @torch.no_grad()
    def init_from_experts_(self, ffn: FfnWeights) -> None:
        self.weight.copy_(expert_centres(ffn, self.num_experts))
        self.gain.fill_(1)

    def score(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(F.linear(x, self.weight), self.gain.shape, self.gain, eps=1e-6)

    def loss(self, scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(scores.float(), F.layer_norm(targets.float(), targets.shape[-1:], eps=1e-12))

    def strengths(self, scores: torch.Tensor) -> torch.Tensor:
        return scores.relu()


def relative_to_largest(targets: torch.Tensor) -> torch.Tensor:
    """(T, E) -> (T, E): targets relative to the token's largest, in [0, 1]."""
    return targets.float() / targets.float().amax(-1, keepdim=True).clamp_min(1e-6)
