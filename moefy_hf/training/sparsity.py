"""Make FFN activations sparse before or while a model is MoEfied: swap the activation for ReLU, penalise activity."""

import copy
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from ..measure.padding import real_tokens
from ..modeling.ffn_sites import FfnSite, find_sites
from ..modeling.routed_activation import is_routed
from .losses import ExtraLossCallback

# config fields that name an FFN's activation, over all supported model types
_ACTIVATION_FIELDS = (
    "hidden_act",
    "activation_function",
    "hidden_activation",
    "activation",
    "dense_act_fn",
)
_ACTIVATION_MODULES = ("transformers.activations", "torch.nn.modules.activation")


def relufy_(model: PreTrainedModel, activation: str = "relu") -> PreTrainedModel:
    """Replace the activation of every FFN, in the modules and in the config, in place (ReLU-fication).

    So that the model is the same when it is loaded again, what else reads its activation from the same field of the
    config changes too: the transform of BERT's masked-language-model head, for one. The model needs fine-tuning
    afterwards: the swap changes its function.

    Raises:
        ValueError: unknown activation, a MoEfied model, or a model type whose config does not name its FFN activation;
            the model is unchanged then.
    """
    if activation not in ACT2FN:
        raise ValueError(f"unknown activation {activation!r}; choose from {', '.join(sorted(ACT2FN))}")
    sites = find_sites(model)
    fields = [field for field in _ACTIVATION_FIELDS if isinstance(getattr(model.config, field, None), str)]
    if not fields:
        raise ValueError(f"the config of model type {model.config.model_type!r} does not name its FFN activation")
    for site in sites:
        if is_routed(site.act):
            raise ValueError(f"{site.name} is routed already; swap the activation before converting")
    config = copy.deepcopy(model.config)
    for config_field in fields:
        setattr(config, config_field, activation)
    if hasattr(config, "feed_forward_proj"):  # T5 derives its activation from this one when loaded
        gated = config.feed_forward_proj.startswith("gated-")
        config.feed_forward_proj = f"gated-{activation}" if gated else activation
    with torch.device("meta"):  # what loading a checkpoint with this config will build
        twin = dict(type(model)(config).named_modules())
    for site in sites:
        act = twin[f"{site.name}.{site.spec.act}".lstrip(".")]
        if type(act) is not type(ACT2FN[activation]):
            raise ValueError(f"{site.name}: the config does not decide its activation, which stays a {act}")
    for name, module in model.named_modules():
        if type(module).__module__ in _ACTIVATION_MODULES and repr(module) != repr(twin[name]):
            model.set_submodule(name, twin[name])
    for config_field in (*fields, "feed_forward_proj"):
        if hasattr(config, config_field):
            setattr(model.config, config_field, getattr(config, config_field))
    return model


def square_hoyer(a: torch.Tensor) -> torch.Tensor:
    """(T, f) -> (T,): (sum|a|)^2 / (f sum a^2), the share of neurons that are effectively active, in [1/f, 1]
    (D2DMoE)."""
    a = a.float()
    return a.abs().sum(-1).square() / (a.square().sum(-1) * a.shape[-1]).clamp_min(1e-12)


def l1(a: torch.Tensor) -> torch.Tensor:
    """(T, f) -> (T,): mean |a|."""
    return a.float().abs().mean(-1)


def density(a: torch.Tensor, sharpness: float = 10.0) -> torch.Tensor:
    """(T, f) -> (T,): mean tanh(sharpness |a|), a smooth share of the neurons that fire (the density loss of DEFT; the
    sharpness is ours)."""
    return torch.tanh(sharpness * a.float().abs()).mean(-1)


PENALTIES = {"square_hoyer": square_hoyer, "l1": l1, "density": density}


class SparsityPenaltyCallback(ExtraLossCallback):
    """Adds `weight` times the mean activity of all FFNs to the training loss, and logs that activity. Padding does not
    count.

    Args:
        penalty: "square_hoyer", "l1" or "density".
        weight: its factor; a mean over tokens and layers is multiplied, so one weight suits every width and depth.

    Raises:
        ValueError: unknown penalty or negative weight; in training, when the model returns no loss.
    """

    name = "sparsity_penalty"

    def __init__(self, penalty: str = "square_hoyer", weight: float = 0.1):
        if penalty not in PENALTIES:
            raise ValueError(f"unknown penalty {penalty!r}; choose from {', '.join(PENALTIES)}")
        super().__init__(weight)
        self.penalty = PENALTIES[penalty]
        self.values: list[torch.Tensor] = []

    def watch(self, model: PreTrainedModel) -> list:
        return [
            site.down.register_forward_pre_hook(lambda _, args, site=site: self.collect(model, site, args[0]))
            for site in find_sites(model)
        ]

    def begin(self) -> None:
        self.values = []

    def collect(self, model: PreTrainedModel, site: FfnSite, neurons: torch.Tensor) -> None:
        if site.owner.training:
            each = self.penalty(neurons).flatten()  # (T,)
            real = real_tokens(model, site, self.batch, len(each))
            value = each.mean() if real is None else (each * real).sum() / real.sum().clamp_min(1)
            if self.running:  # a checkpointed layer repeats the computation for its gradients, not for another value
                self.values.append(value)

    def value(self, model: PreTrainedModel, output: Any) -> torch.Tensor | None:
        return torch.stack(self.values).mean() if self.values else None
