"""Learned selection: routers and model train together until few experts matter, then experts are selected for good.

LTE, "Learn To be Efficient: Build Structured Sparsity in Large Language Models" (Zheng et al., NeurIPS 2024),
section 4.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..errors import MoefyError, NotMoefied, UnsupportedModel
from ..measure.metrics import unwrapped
from ..measure.padding import real_tokens
from ..modeling.ffn_sites import FfnSite
from ..modeling.moefied import is_moefied
from ..modeling.section import MEASURED_WITH_ROUTERS, Section
from .losses import ExtraLossCallback
from .schedule import Phase, Timetable
from .trainer_tools import announce, refuse_sharded

logger = logging.get_logger("moefy_hf")

FLOOR = 0.01  # added to the squared distance between routing weight and threshold: bounds the penalty
SHARDED = "{} keeps parameters in shards, and routers cannot be frozen in those: train in one process or with DDP"


class LearnedSelectionCallback(ExtraLossCallback):
    """Trains the sigmoid routers of a MoEfied model with the model, in two stages.

    In the first stage all experts run, each multiplied by its routing weight G = sigmoid(W x). The loss is the model's
    own plus `eta` mean(G^2) + `lam` mean(1 / ((G - tau)^2 + 0.01)). These are means over tokens, routed experts and
    FFNs; padding does not count. Gradients reach routers and, through them, what routers read.

    In the second stage routers are frozen. The experts with G >= tau run, unweighted, and the model trains on. The
    stage follows from the step, so a run may be resumed anywhere.

    From the first step on the selection of the model is that threshold. Evaluation computes it, and checkpoints hold
    it, in both stages: experts are weighted in training mode only, and the weighting is never saved.

    Three things differ from the paper. The second penalty has the 0.01, without which it has no bound where G meets
    tau. Routers start as `moefy_` has fitted them, not at random. And `lam` is 0.01 by default, not 0.5: on a small
    classifier 0.5 drowned the task, and hardly an expert crossed the threshold, whatever `eta`. Whether the paper
    still weights experts in its second stage we could not find out.

    Logs carry `router_loss` (both penalties, 0 in the second stage) and `moe_experts`, the share with G >= tau.

    With an adapter, put the routers into it: `LoraConfig(..., modules_to_save=["router"])`. Its checkpoints lack the
    base model's config: merge it before saving, or `set_selection(type="level", level=-log(tau))` after loading.

    Args:
        eta: weight of the efficiency penalty: the larger, the fewer experts. It sets the budget.
        tau: the threshold that a routing weight must reach, between 0 and 1: the larger, the fewer experts. The `tau`
            of `set_selection(type="threshold")` is another number, and goes the other way: the larger, the more.
        lam: weight of the separability penalty, which moves G away from tau, so that experts stay on their side of it.
        until: the end of the first stage: a step (int), or a share of all steps (float in (0, 1]).

    Raises:
        MoefyError: an argument out of range; FSDP or DeepSpeed; compensation, or routers that are not "sigmoid" or not
            in the adapter; when training begins, an optimizer without the routers, or a first stage longer than the
            training.
        NotMoefied: when the Trainer is made, the model is not MoEfied yet, or only going to be.
        UnsupportedModel: the model runs older code that came with its checkpoint.

    Example:
        >>> moefy_(model, MoEficationConfig(router="sigmoid"), batches)
        >>> callback = LearnedSelectionCallback(eta=5.0, tau=0.5)
        >>> Trainer(model, args, train_dataset=dataset, callbacks=[callback]).train()
    """

    name = "router_loss"

    def __init__(self, eta: float, tau: float = 0.5, lam: float = 0.01, until: int | float = 0.5):
        for name, value in (("eta", eta), ("lam", lam)):
            if not 0 <= value < math.inf:
                raise MoefyError(f"{name} is a weight and must not be negative, got {value}")
        if not 0 < tau < 1:
            raise MoefyError(f"tau must lie between 0 and 1, as routing weights do, got {tau}")
        super().__init__(1.0)
        self.eta, self.tau, self.lam = eta, tau, lam
        self.phases = [Phase(until, name="soft")] + ([Phase(1.0, name="hard")] if until != 1.0 else [])
        self.routers = RoutersInTraining([])
        self.values: list[torch.Tensor] = []
        self.share_sum, self.shares = torch.zeros(()), 0

    # ---- the Trainer's events

    def on_init_end(self, args, state, control, model=None, **kwargs):
        refuse_sharded(args, SHARDED)
        RoutersInTraining(checked_sites(model)).set_(soft=False, trainable=True)  # so that the optimizer holds them

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        timetable, routers = Timetable(self.phases, state.max_steps), RoutersInTraining(checked_sites(model))
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if any(id(parameter) not in held for parameter in routers.parameters()):
            raise MoefyError(
                "the optimizer does not hold the routers: a Trainer must be made with both model= (model_init= comes "
                f"too late) and callbacks=[{type(self).__name__}(...)]"
            )
        self.timetable, self.share_sum, self.shares = timetable, torch.zeros(()), 0
        super().on_train_begin(args, state, control, model, **kwargs)
        Section(unwrapped(model).config).forget(MEASURED_WITH_ROUTERS)  # as they were
        self.enter(args, state, model)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if self.enter(args, state, model):
            announce(
                args, state, f"routers are frozen; experts of routing weight {self.tau:g} or more run from here on"
            )

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if not self.routers.soft:
            self.routers.drop_gradients()  # a zero would still move them: momentum, weight decay

    def on_train_end(self, args, state, control, model=None, **kwargs):
        super().on_train_end(args, state, control)
        if model is not None and self.timetable.at(max(state.global_step - 1, 0)) + 1 < len(self.phases):
            logger.warning("training ended in its first stage: the model was not trained with the experts it selects")

    def figures(self, args, state) -> dict[str, float]:
        share = {"moe_experts": float(self.share_sum) / self.shares} if self.shares else {}
        self.share_sum, self.shares = torch.zeros(()), 0
        return super().figures(args, state) | share

    # ---- what the events do

    def enter(self, args, state, model) -> bool:
        """Put the model into the stage of the step that begins; return whether the second stage begins with it.

        Args:
            args: the Trainer's arguments.
            state: the Trainer's state.
            model: the model in training.
        """
        base, selection = unwrapped(model), {"type": "level", "level": -math.log(self.tau)}
        if Section(base.config).selection != selection:
            base.set_selection(**selection)
        soft, was = self.timetable.at(state.global_step) == 0, self.routers.soft
        self.routers.set_(soft, trainable=soft or args.world_size > 1)  # DDP waits for all that it was given
        return was and not soft

    def watch(self, model: PreTrainedModel) -> list:
        """Register a hook on every router; return the handles, and one that ends the training of routers."""
        sites = unwrapped(model).moe_sites()
        self.routers = RoutersInTraining(sites)
        hooks = [
            site.act.router.register_forward_hook(lambda _, args, scores, site=site: self.collect(model, site, scores))
            for site in sites
        ]
        return [self.routers, *hooks]

    def begin(self) -> None:
        """Forget the penalties of the batch before."""
        self.values = []

    def collect(self, model: PreTrainedModel, site: FfnSite, scores: torch.Tensor) -> None:
        """Add penalty and share of selected experts of one FFN on the batch.

        Args:
            model: the model in training.
            site: the FFN.
            scores: (..., E - S) what its router returned, for E experts of which S are shared.
        """
        act = site.act
        if not act.training:
            return
        weights = act.router.strengths(scores).flatten(0, -2)  # (T, E - S)
        real = real_tokens(model, site, self.batch, len(weights))
        real = weights.new_ones(len(weights)) if real is None else real.to(weights.dtype)
        if act.weighs:
            penalties = penalty(weights, self.eta, self.tau, self.lam)  # (T,)
            value = (penalties * real).sum() / real.sum().clamp_min(1)
            if self.running:  # a checkpointed layer repeats the computation for its gradients, not for another value
                self.values.append(value)
        if self.running:
            selected = act.chosen(scores.detach()).flatten(0, -2).float().mean(-1)  # (T,)
            self.share_sum = self.share_sum.to(selected.device) + (selected * real).sum() / real.sum().clamp_min(1)
            self.shares += 1

    def value(self, model: PreTrainedModel, output: Any) -> torch.Tensor | None:
        """Return the mean penalty over FFNs, of shape ()."""
        if self.values:
            return torch.stack(self.values).mean()
        # zero, from all routers: under DDP a trainable parameter without a gradient stalls the run
        return torch.stack([0 * parameter.sum() for parameter in self.routers.parameters()]).sum()


def penalty(weights: torch.Tensor, eta: float, tau: float, lam: float) -> torch.Tensor:
    """Return efficiency and separability penalty of each token, a mean over experts (LTE, section 4).

    Args:
        weights: (T, E) routing weights, in [0, 1].
        eta: factor of the efficiency penalty.
        tau: the threshold.
        lam: factor of the separability penalty.

    Returns:
        (T,) one penalty a token.
    """
    separability = 1 / ((weights - tau).square() + FLOOR)
    return (eta * weights.square() + lam * separability).mean(-1)


class RoutersInTraining:
    """Puts the routers of a run into one stage or the other.

    It has the `remove` of a hook's handle, which leaves routers as they are between runs.

    Args:
        sites: the routed FFNs.
    """

    def __init__(self, sites: list[FfnSite]):
        self.sites, self.soft = sites, False

    def parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over the routers' parameters: those of the adapter, where it holds the routers."""
        for site in self.sites:
            router = site.act.router
            if isinstance(router, ModulesToSaveWrapper):  # the adapter's copy is the one that runs
                router = router.modules_to_save[router.active_adapters[0]]
            yield from router.parameters()

    def set_(self, soft: bool, trainable: bool) -> None:
        """Set the stage.

        Args:
            soft: all experts run in training mode, multiplied by their routing weights.
            trainable: routers have gradients.
        """
        self.soft = soft
        for site in self.sites:
            site.act.soft = soft
        for parameter in self.parameters():
            parameter.requires_grad_(trainable)

    def drop_gradients(self) -> None:
        """Forget the gradients of all routers."""
        for parameter in self.parameters():
            parameter.grad = None

    def remove(self) -> None:
        """Freeze the routers, and select as checkpoints do."""
        self.set_(soft=False, trainable=False)
        self.drop_gradients()


def checked_sites(model: PreTrainedModel) -> list[FfnSite]:
    """Return the routed FFNs of a model that can learn its selection.

    Args:
        model: a model, or a peft model around one.

    Raises:
        MoefyError: see `LearnedSelectionCallback`.
    """
    base = unwrapped(model)
    if not is_moefied(base) or Section(base.config).splits == 0:
        raise NotMoefied(
            "selection is learned by a model that has its experts, and a schedule of MoEficationCallback selects by "
            "itself: convert the model first (moefy_hf.moefy_)"
        )
    section, sites = Section(base.config), base.moe_sites()
    if section.router != "sigmoid":
        raise MoefyError(
            f"selection is learned by routers of kind 'sigmoid', the model has {section.router!r}: convert with "
            'router="sigmoid", or moefy_hf.reroute_(model, "sigmoid", profile)'
        )
    if any("soft" not in vars(site.act) for site in sites):
        raise UnsupportedModel(
            "this model runs code that came with its checkpoint and is too old to learn a selection: load it with "
            "moefy_hf.load(name), whose code is the package's"
        )
    if section.compensation:
        raise MoefyError("training moves the means of compensation: call moefy_hf.compensate_ when it is over")
    if base is not model and any(not isinstance(site.act.router, ModulesToSaveWrapper) for site in sites):
        raise MoefyError(
            "the adapter does not hold the routers, so its checkpoints would lack what they learn: make it with "
            'modules_to_save=["router"]'
        )
    return sites
