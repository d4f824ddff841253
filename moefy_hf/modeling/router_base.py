"""What routers have in common: the base class, what they start from, and what they are fitted to."""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .errors import MoefyError
from .ffn_weights import FfnWeights


def activation_mass(neurons: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """(T, E, m), (d, E, m) -> (T, E): summed positive activations (MoEfication, section 3.3)."""
    return neurons.clamp_min(0).sum(-1)


def output_norm(neurons: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """(T, E, m), (d, E, m) -> (T, E): the L2 norm of each expert's output (D2DMoE, section 3.2).

    It is computed from the experts' Gram matrices, so that no (T, E, d) tensor is made.
    """
    experts = down.permute(1, 2, 0)  # (E, m, d)
    gram = experts @ experts.transpose(1, 2)  # (E, m, m)
    squares = (torch.einsum("tem,emn->ten", neurons, gram) * neurons).sum(-1)
    return squares.clamp_min(0).sqrt()


def prior_affinity(neurons: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """(T, E, m), (d, E, m) -> (T, E): how well each expert alone stands for the FFN (FactorLLM's prior).

    This is the softmax over the experts of minus the mean squared error that each leaves of the FFN's output y.
    """
    output = torch.einsum("tem,dem->td", neurons, down)
    inner = torch.einsum("tem,tem->te", neurons, torch.einsum("td,dem->tem", output, down))  # E_e(x) . y
    squares = output_norm(neurons, down).square() - 2 * inner + output.square().sum(-1, keepdim=True)
    return (-squares.float() / down.shape[0]).softmax(-1)


class Router(nn.Module):
    """The base class: x (..., d) -> scores (..., E), in the router's own dtype and outside autocast.

    A method is one subclass and one line of `ROUTERS`; whatever else has to be known of it is a class attribute here.
    Subclasses that define `score`, `forward` or `strengths` do not inherit `kernel_weights` and `export_weight`, which
    describe the formula of their parent.

    Attributes:
        paper: where the method is from; empty for this package's own and for controls.
        trainable: whether the router is fitted to calibration data.
        reuses_expert_compute: whether what the router computes of an expert is part of what the expert computes, so
            that only experts that do not run cost it anything.
        serves_stack: whether one router chooses for all layers of a stack, so that experts with the same number must
            correspond.
        settings: keyword arguments of `__init__` that a user may set, with their defaults. Whole numbers are widths,
            from 1; others are shares, in (0, 1].
        kernel_weights: names of the router's one or two matrices, in the order in which they multiply x, where its
            scores are that product: the C++ kernel then scores by itself. Empty for all other routers.
        kernel_strengths: which of the kernel's functions `strengths` is, "softmax" or "sigmoid".
        export_weight: the name of its matrix (E, d), where a served MoE's linear router can hold it.
        targets: what it is fitted to, from neurons (T, E, m) and down (d, E, m): (T, E).
    """

    paper: ClassVar[str] = ""
    trainable: ClassVar[bool] = True
    reuses_expert_compute: ClassVar[bool] = False
    serves_stack: ClassVar[bool] = False
    settings: ClassVar[dict[str, Any]] = {}
    kernel_weights: ClassVar[tuple[str, ...]] = ()
    kernel_strengths: ClassVar[str] = "softmax"
    export_weight: ClassVar[str | None] = None
    targets = staticmethod(output_norm)

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if vars(cls).keys() & {"score", "forward", "strengths"}:
            cls.kernel_weights = vars(cls).get("kernel_weights", ())
            cls.export_weight = vars(cls).get("export_weight")

    def __init__(self, hidden_size: int, num_experts: int):
        super().__init__()
        self.hidden_size, self.num_experts = hidden_size, num_experts

    @classmethod
    def of(cls, ffn: FfnWeights, num_experts: int, **settings: Any) -> "Router":
        """Make a router for an FFN of this kind and width; nothing is read from its weights."""
        return cls(ffn.down.shape[0], num_experts, **settings)

    @classmethod
    def check_settings(cls, settings: Mapping[str, Any]) -> None:
        """Check what a user sets.

        Raises:
            MoefyError: a setting that this kind of router has not, or one out of range.
        """
        for name, value in settings.items():
            if name not in cls.settings:
                has = f"choose from {', '.join(cls.settings)}" if cls.settings else "it has none"
                raise MoefyError(f"{cls.__name__} has no setting {name!r}: {has}")
            width, number = isinstance(cls.settings[name], int), isinstance(value, int | float)
            fits = isinstance(value, int) and value >= 1 if width else number and 0 < value <= 1
            if not fits or isinstance(value, bool):
                valid = "a whole number from 1" if width else "a share in (0, 1]"
                raise MoefyError(f"{name} of {cls.__name__} must be {valid}, got {value!r}")

    def read_from_(self, ffn: Callable[[], FfnWeights], shared: int) -> None:
        """Take what returns the FFN's weights as they are now, S shared experts first.

        Only routers that run part of their FFN keep it.
        """

    # Routers that choose for a whole stack of layers; all others have nothing to do here.

    @classmethod
    def connect_stack_(cls, routed: Sequence[Any], stack: nn.Module, first: str) -> None:
        """Connect the routers of one stack, once all of them are in place.

        Args:
            routed: the stack's routed activations, in forward order.
            stack: the module that runs the layers.
            first: the name of the first FFN.

        Raises:
            MoefyError: see `check_counts`.
        """

    @classmethod
    def connect_checkpointing_(cls, model: nn.Module) -> None:
        """Let gradient checkpointing recompute layers as they ran; called whenever a model's has been set."""

    @classmethod
    def check_counts(cls, counts: Sequence[int], first: str) -> None:
        """Check that these routers can choose among so many experts.

        Args:
            counts: how many experts each FFN of a stack has; `first` names the first.

        Raises:
            MoefyError: one router cannot choose among different numbers.
        """

    def scorer(self) -> "Router":
        """Return the router whose weights score for this one, and whose FFN's input is what is read."""
        return self

    def observe(self, x: torch.Tensor) -> None:
        """Learn that the FFN is about to run on x (..., d), all its experts or some."""

    def hand_on(self, scores: torch.Tensor) -> None:
        """Learn the scores (..., E) of what was observed, for routers of later layers.

        Not renamed: routed activations that came with a checkpoint call it, also on routers of this package.
        """

    # What a method defines

    def reset_parameters(self) -> None:
        """Initialise as transformers does a new module: tensors that a checkpoint has loaded stay as they are."""
        for weight in self.parameters():
            width = max(weight.shape[-1], 1)  # 0 where another process has a loaded one (ZeRO-3)
            init.normal_(weight, mean=0.0, std=width**-0.5)

    def init_from_experts_(self, ffn: FfnWeights) -> None:
        """Start from the weights of the E experts that are routed to, which lie expert by expert."""

    def score(self, x: torch.Tensor) -> torch.Tensor:
        raise TypeError(f"{type(self).__name__} defines no score")

    def strengths(self, scores: torch.Tensor) -> torch.Tensor:
        """(..., E) -> (..., E): scores as routing weights, which are not negative and compare experts by ratio.

        Dynamic selections choose by them. Here they are the shares that `loss` fits.
        """
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
        """The dtype of its weights, also while FSDP has put plain tensors in the place of parameters."""
        weight = next((each for each in chain(self.parameters(), vars(self).values()) if torch.is_tensor(each)), None)
        return torch.float32 if weight is None else weight.dtype

    def flops(self) -> int:
        """Return its FLOPs per token; a multiply-add counts as two. Biases are left out, as those of the FFN are."""
        return 2 * sum(weight.numel() for weight in self.parameters() if weight.dim() == 2)


def expert_keys(ffn: FfnWeights, num_experts: int) -> torch.Tensor:
    """(E, m, d): the rows by which each expert's neurons fire."""
    return ffn.keys.detach().float().unflatten(0, (num_experts, -1))


def expert_centres(ffn: FfnWeights, num_experts: int) -> torch.Tensor:
    """(E, d): the mean of each expert's normalised keys."""
    return F.normalize(expert_keys(ffn, num_experts), dim=-1).mean(1)
