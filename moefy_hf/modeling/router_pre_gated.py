"""One router for all layers of a stack, read where the first of them begins: `pre_gated` (Read-ME).

The first routed FFN's router, the leader, scores its FFN's input; the routers of later FFNs have no weights and return
the scores that the leader computed in this same forward pass. A pass is handed on beside the model's own code, one per
thread. It begins with the leader's FFN and ends with its stack, and only the FFN that runs may ask, in forward order
and with as many tokens: whatever does not fit raises.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from .errors import MoefyError
from .ffn_weights import FfnWeights
from .routed_activation import PerThread, RoutedActivation
from .router_base import Router, expert_centres


class Pass:
    """What one forward pass hands on: the first FFN's input x (..., d), and its scores (..., E) once somebody has
    asked for them."""

    def __init__(self, x: torch.Tensor):
        self.x = x
        self.scores: torch.Tensor | None = None


class Handed(PerThread):
    """The pass under way, and the position of the FFN that runs."""

    now: Pass | None = None
    running: int = -1


class PreGatedRouter(Router):
    """scores = W x of the first routed FFN of a stack, for every FFN of it (pre-gating: Read-ME, NeurIPS 2024).

    For systems that fetch or batch experts: which ones all layers will run is known when the first begins. It costs
    quality, for one choice cannot be the best of every layer; where nothing is fetched, prefer "linear".

    Fitted to the mean over the layers of each expert's share of the output norms, after the experts of later layers
    were reordered, so that those with the same number are used at the same tokens. The paper builds experts by domains
    of text, so that they correspond in all layers, and tunes a router network of its own together with the model.

    No gradient flows through the scores that are handed on. Encoder and decoder have a leader each, for they see other
    tokens.
    """

    paper = "Read-ME"
    serves_stack = True

    def __init__(self, hidden_size: int, num_experts: int):
        super().__init__(hidden_size, num_experts)
        self.weight: nn.Parameter | None = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.leads: tuple[PreGatedRouter, ...] = ()  # in a tuple: no child of this module
        self.position = 0
        self.handed = Handed()

    @property
    def leader(self) -> "PreGatedRouter":
        """The router that scores for this one: itself, where it is of a stack's first FFN."""
        return self.leads[0] if self.leads else self

    def scorer(self) -> "PreGatedRouter":
        return self.leads[0] if self.leads else self

    @classmethod
    def connect_stack_(cls, routed: Sequence[RoutedActivation], stack: nn.Module, first: str) -> None:
        cls.check_counts([act.router.num_experts for act in routed], first)
        leader, *others = (cast(PreGatedRouter, act.router) for act in routed)  # one kind for all of a stack
        for position, router in enumerate(others, start=1):
            router.follow_(leader, position)
        if not any(isinstance(hook, EndsPass) for hook in stack._forward_pre_hooks.values()):
            hook = EndsPass(routed[0])
            stack.register_forward_pre_hook(hook)
            stack.register_forward_hook(hook)

    @classmethod
    def check_counts(cls, counts: Sequence[int], first: str) -> None:
        if len(set(counts)) > 1:
            raise MoefyError(
                f"router 'pre_gated' chooses the same experts in every layer from {first} on, so all need the same "
                f"number; got {', '.join(map(str, counts))}"
            )

    @classmethod
    def connect_checkpointing_(cls, model: nn.Module) -> None:
        routed = [module for module in model.modules() if isinstance(module, RoutedActivation)]
        firsts = [act for act in routed if isinstance(act.router, cls) and act.router.leader is act.router]
        for module in model.modules():
            checkpoint = vars(module).get("_gradient_checkpointing_func")
            if checkpoint is not None and not isinstance(checkpoint, CarryingCheckpoint):
                module._gradient_checkpointing_func = CarryingCheckpoint(checkpoint, firsts)

    def follow_(self, leader: "PreGatedRouter", position: int) -> None:
        """Have no weights any more, and return what `leader` scores."""
        self.weight, self.leads, self.position = None, (leader,), position

    @torch.no_grad()
    def init_from_experts_(self, ffn: FfnWeights) -> None:
        if self.weight is not None:
            self.weight.copy_(expert_centres(ffn, self.num_experts))

    def score(self, x: torch.Tensor) -> torch.Tensor:
        assert self.weight is not None, "routers that follow do not score"
        return F.linear(x, self.weight)

    def observe(self, x: torch.Tensor) -> None:
        handed = self.leader.handed
        if self.leader is self:
            handed.now = Pass(x.detach())
        elif not self.position > handed.running:  # run by itself, or again
            handed.now = None
        handed.running = self.position

    def hand_on(self, scores: torch.Tensor) -> None:
        now = self.handed.now
        if self.leader is self and now is not None and scores.shape[:-1] == now.x.shape[:-1]:
            now.scores = scores.detach()

    def close(self) -> None:
        """Hand nothing on any more."""
        self.handed.now, self.handed.running = None, -1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., d) -> (..., E).

        Raises:
            RuntimeError: this router follows another, and its FFN is not running in a forward pass of the model that
                began with the leader's.
        """
        if self.leader is self:
            return super().forward(x)
        handed = self.leader.handed
        now = handed.now
        if now is None or handed.running != self.position or now.x.shape[:-1] != x.shape[:-1]:
            raise RuntimeError(
                f"a pre-gated router (number {self.position} of its stack) has no scores to return: the first routed "
                "FFN did not run before this one, on as many tokens, in this forward pass of the whole stack. Layers "
                "cannot run alone, in chunks or with layer drop, nor be recomputed by gradient checkpointing that was "
                "not enabled through the whole model; by itself only `router.leader` scores, what the first FFN reads"
            )
        if now.scores is None:  # the first FFN runs all its experts
            with torch.no_grad():
                now.scores = self.leader(now.x)
        return now.scores.to(x.device)


class EndsPass:
    """A forward-pre-hook and forward hook of a stack: forget what an interrupted call left, and what a call leaves."""

    def __init__(self, first: RoutedActivation):
        self.first: RoutedActivation = first  # whose router may be replaced

    def __call__(self, stack: nn.Module, args: tuple, output: Any = None) -> None:
        if isinstance(self.first.router, PreGatedRouter):
            self.first.router.close()


class CarryingCheckpoint:
    """A function that checkpoints a layer (`torch.utils.checkpoint`) and carries the pass that the layer was run in.

    When the layer is recomputed, it sees that pass again, whatever ran between, and in whichever thread.
    """

    def __init__(self, checkpoint: Callable, firsts: Sequence[RoutedActivation]):
        self.checkpoint, self.firsts = checkpoint, firsts

    def __call__(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        routers = [first.router for first in self.firsts if isinstance(first.router, PreGatedRouter)]
        passes = [(router.handed, router.handed.now, router.handed.running) for router in routers]
        runs = 0

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal runs
            runs += 1
            with resumed(passes) if runs > 1 else contextlib.nullcontext():
                return function(*args, **kwargs)

        return self.checkpoint(run, *args, **kwargs)


@contextlib.contextmanager
def resumed(passes: list[tuple[Handed, Pass | None, int]]) -> Iterator[None]:
    """Go on with passes as they stood, for a while."""
    meanwhile = [(handed, handed.now, handed.running) for handed, _, _ in passes]
    try:
        stand(passes)
        yield
    finally:
        stand(meanwhile)


def stand(passes: list[tuple[Handed, Pass | None, int]]) -> None:
    """Put passes, and the positions of the FFNs that run, where routers look for them."""
    for handed, now, running in passes:
        handed.now, handed.running = now, running
