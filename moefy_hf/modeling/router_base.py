"""What routers have in common: the base class, where they start from, and what they are fitted to."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

if TYPE_CHECKING:  # ffn_sites needs this file
    from .ffn_sites import FfnSite, FfnWeights


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
    """Base class: x (..., d) -> scores (..., E), in the router's own dtype and outside autocast.

    Attributes:
        begins_experts: whether what the router computes of an expert is part of what the expert computes, so that only
            experts that do not run cost it anything.
        per_stack: whether one router chooses for all layers of a stack, so that experts with the same number must
            correspond.
        settings: what can be set of it, keyword arguments of its `__init__`, with their defaults: whole numbers are
            widths, from 1; others are shares, in (0, 1].
    """

    trainable = True
    begins_experts = False
    per_stack = False
    settings: ClassVar[dict[str, Any]] = {}
    targets = staticmethod(output_norm)  # neurons (T, E, m), down (d, E, m) -> (T, E)

    def __init__(self, hidden_size: int, num_experts: int):
        super().__init__()
        self.hidden_size, self.num_experts = hidden_size, num_experts

    @classmethod
    def of(cls, ffn: "FfnWeights", num_experts: int, **settings: Any) -> "Router":
        """A router for an FFN of this kind and width; nothing is read from its weights."""
        return cls(ffn.down.shape[0], num_experts, **settings)

    @classmethod
    def check_settings(cls, settings: Mapping[str, Any]) -> None:
        """
        Raises:
            ValueError: one that this kind of router has not, or out of range.
        """
        for name, value in settings.items():
            if name not in cls.settings:
                has = f"choose from {', '.join(cls.settings)}" if cls.settings else "it has none"
                raise ValueError(f"{cls.__name__} has no setting {name!r}: {has}")
            width, number = isinstance(cls.settings[name], int), isinstance(value, int | float)
            fits = isinstance(value, int) and value >= 1 if width else number and 0 < value <= 1
            if not fits or isinstance(value, bool):
                valid = "a whole number from 1" if width else "a share in (0, 1]"
                raise ValueError(f"{name} of {cls.__name__} must be {valid}, got {value!r}")

    def read_from_(self, ffn: "Callable[[], FfnWeights]", shared: int) -> None:
        """For routers that run part of their FFN: its weights as they are now, S shared experts first."""

    @classmethod
    def join_(cls, sites: "Sequence[FfnSite]", stack: nn.Module) -> None:
        """For routers that hand something on: those of all routed FFNs of a stack, in forward order, are in place.

        Raises:
            ValueError: see `check_counts`.
        """

    @classmethod
    def check_counts(cls, counts: Sequence[int], first: str) -> None:
        """
        Args:
            counts: how many experts each FFN of a stack has; `first` names the first.

        Raises:
            ValueError: these routers cannot choose of so many.
        """

    def observe(self, x: torch.Tensor) -> None:
        """The FFN is about to run on x (..., d), all its experts or some."""

    def hand_on(self, scores: torch.Tensor) -> None:
        """These are the scores (..., E) of what was observed."""

    def reset_parameters(self) -> None:
        """Initialise as transformers does a new module: tensors that a checkpoint has loaded stay as they are."""
        for weight in self.parameters():
            init.normal_(weight, mean=0.0, std=weight.shape[-1] ** -0.5)

    def init_from_experts_(self, ffn: "FfnWeights") -> None:
        """ffn: the weights of the E experts that are routed to, expert by expert."""

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
            return self.score(x.to(self.dtype))

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights, also while FSDP has put plain tensors in the place of parameters."""
        held = next(self.parameters(), None)
        held = next((each for each in vars(self).values() if torch.is_tensor(each)), None) if held is None else held
        return torch.float32 if held is None else held.dtype

    def flops(self) -> int:
        """Per token; a multiply-add counts as two. Biases are left out, as those of the FFN are."""
        return 2 * sum(weight.numel() for weight in self.parameters() if weight.dim() == 2)


def expert_keys(ffn: "FfnWeights", num_experts: int) -> torch.Tensor:
    """(E, m, d): the rows by which each expert's neurons fire."""
    return ffn.keys.detach().float().unflatten(0, (num_experts, -1))


def expert_centres(ffn: "FfnWeights", num_experts: int) -> torch.Tensor:
    """(E, d): the mean of each expert's normalised keys."""
    return F.normalize(expert_keys(ffn, num_experts), dim=-1).mean(1)
