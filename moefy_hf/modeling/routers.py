"""Routers: FFN input x -> one score per expert. One class per method; `ROUTERS` is their registry.

A router is initialised from the weights of its experts, then, where `trainable`, fitted to `targets`: what each expert
does on each token. Weights are bare Parameters, so that no quantiser and no adapter meant for Linear layers takes
them.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init


def activation_mass(neurons: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """(T, E, m), (d, E, m) -> (T, E): summed positive activations (MoEfication, section 3.3)."""
    return neurons.clamp_min(0).sum(-1)


def output_norm(neurons: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """(T, E, m), (d, E, m) -> (T, E): the L2 norm of each expert's output (D2DMoE, section 3.2).

    By way of the experts' Gram matrices, so that no (T, E, d) tensor is made.
    """
    experts = down.permute(1, 2, 0)  # (E, m, d)
    gram = experts @ experts.transpose(1, 2)  # (E, m, m)
    squares = (torch.einsum("tem,emn->ten", neurons, gram) * neurons).sum(-1)
    return squares.clamp_min(0).sqrt()


def prior_affinity(neurons: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """(T, E, m), (d, E, m) -> (T, E): softmax over the experts of minus the mean squared error that each leaves of the
    FFN's output y when it answers alone (FactorLLM's prior)."""
    output = torch.einsum("tem,dem->td", neurons, down)
    inner = torch.einsum("tem,tem->te", neurons, torch.einsum("td,dem->tem", output, down))  # E_e(x) . y
    squares = output_norm(neurons, down).square() - 2 * inner + output.square().sum(-1, keepdim=True)
    return (-squares.float() / down.shape[0]).softmax(-1)


class Router(nn.Module):
    """Base class: x (..., d) -> scores (..., E), in the router's own dtype and outside autocast."""

    trainable = True
    targets = staticmethod(output_norm)  # neurons (T, E, m), down (d, E, m) -> (T, E)

    def __init__(self, hidden_size: int, num_experts: int):
        super().__init__()
        self.hidden_size, self.num_experts = hidden_size, num_experts

    def reset_parameters(self) -> None:
        """Initialise as transformers does a new module: tensors that a checkpoint has loaded stay as they are."""
        for weight in self.parameters():
            init.normal_(weight, mean=0.0, std=weight.shape[-1] ** -0.5)

    def init_from_experts_(self, keys: torch.Tensor) -> None:
        """keys (E, m, d): the rows by which each expert's neurons fire."""

    def score(self, x: torch.Tensor) -> torch.Tensor:
        raise TypeError(f"{type(self).__name__} defines no score")

    def strengths(self, scores: torch.Tensor) -> torch.Tensor:
        """(..., E) -> (..., E): scores as numbers that are not negative, for selections that compare experts by ratio;
        here the shares that `loss` fits."""
        return scores.float().softmax(-1)

    def loss(self, scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """(T, E), (T, E) -> (): cross-entropy between softmax(scores) and each expert's share of the token's targets.

        A score so comes to estimate the logarithm of that share: a ranking loss in which every token counts the same
        and an expert counts by what it contributes.
        """
        shares = targets.float() / targets.float().sum(-1, keepdim=True).clamp_min(1e-12)
        return -(scores.float().log_softmax(-1) * shares).sum(-1).mean()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.score(x.to(next(self.parameters()).dtype))

    def flops(self) -> int:
        """Per token; a multiply-add counts as two."""
        return 2 * sum(weight.numel() for weight in self.parameters())


def expert_centres(keys: torch.Tensor) -> torch.Tensor:
    """(E, m, d) -> (E, d): the mean of each expert's normalised rows."""
    return F.normalize(keys.float(), dim=-1).mean(1)


class LinearRouter(Router):
    """scores = W x: as good as the MLP on sparse models, cheaper, and the only kind that served MoE formats can
    hold."""

    def __init__(self, hidden_size: int, num_experts: int):
        super().__init__(hidden_size, num_experts)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))

    @torch.no_grad()
    def init_from_experts_(self, keys: torch.Tensor) -> None:
        self.weight.copy_(expert_centres(keys))

    def score(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


class PriorApproximateRouter(LinearRouter):
    """scores = W x, fitted by FactorLLM's Prior-Approximate loss: the cross-entropy, which is a KL divergence up to a
    constant, between softmax(scores) and how well each expert alone stands for the FFN."""

    targets = staticmethod(prior_affinity)


class MLPRouter(Router):
    """W2 tanh(W1 x / |x|), W1 starting at the expert centres and W2 at the identity (MoEfication, section 3.3)."""

    targets = staticmethod(activation_mass)

    def __init__(self, hidden_size: int, num_experts: int):
        super().__init__(hidden_size, num_experts)
        self.proj_in = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.proj_out = nn.Parameter(torch.empty(num_experts, num_experts))

    @torch.no_grad()
    def init_from_experts_(self, keys: torch.Tensor) -> None:
        self.proj_in.copy_(expert_centres(keys))
        self.proj_out.copy_(torch.eye(self.num_experts))

    def loss(self, scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Binary cross-entropy, targets relative to each token's largest (the paper: to the batch's, which drifts)."""
        scale = targets.amax(-1, keepdim=True).clamp_min(1e-6)
        return F.binary_cross_entropy_with_logits(scores.float(), targets.float() / scale)

    def score(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(torch.tanh(F.linear(F.normalize(x, dim=-1), self.proj_in)), self.proj_out)


class SimilarityRouter(Router):
    """Cosine of x with the expert's centre; nothing is trained (MoEfication, section 3.3: parameter centre)."""

    trainable = False
    targets = staticmethod(activation_mass)

    def __init__(self, hidden_size: int, num_experts: int):
        super().__init__(hidden_size, num_experts)
        self.centres = nn.Parameter(torch.empty(num_experts, hidden_size))

    @torch.no_grad()
    def init_from_experts_(self, keys: torch.Tensor) -> None:
        self.centres.copy_(F.normalize(expert_centres(keys), dim=-1))

    def score(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.centres)  # the length of x does not change the order


class RandomRouter(Router):
    """A fixed random projection: the control, and SMoE-Dropout's router."""

    trainable = False

    def __init__(self, hidden_size: int, num_experts: int):
        super().__init__(hidden_size, num_experts)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))

    def score(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


ROUTERS = {
    "linear": LinearRouter,
    "prior_approximate": PriorApproximateRouter,
    "mlp": MLPRouter,
    "similarity": SimilarityRouter,
    "random": RandomRouter,
}
