"""Make FFN activations sparse before or while a model is MoEfied: swap the activation for ReLU, penalise activity."""

import copy
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from ..discovery.towers import deciding_configs
from ..errors import MoefyError, UnsupportedModel
from ..measure.padding import real_tokens
from ..modeling.ffn_sites import FfnSite, find_sites
from ..modeling.routed_activation import is_routed
from .losses import ExtraLossCallback

# config fields that name an FFN's activation, over many model types
_ACTIVATION_FIELDS = (
    "hidden_act",
    "activation_function",
    "hidden_activation",
    "activation",
    "dense_act_fn",
)
_ACTIVATION_MODULES = ("transformers.activations", "torch.nn.modules.activation")


def relufy_(model: PreTrainedModel, activation: str = "relu") -> PreTrainedModel:
    """Replace the activation of every FFN by ReLU or another, in the modules and in the config, in place.

    This is ReLU-fication (Mirzadeh et al., ICLR 2024, section 4). It changes the model's function, so the model needs
    fine-tuning afterwards.

    Whatever else reads its activation from the same field of the config changes too, so that the model is the same
    when it is loaded again. The transform of BERT's masked-language-model head is an example.

    Args:
        model: a dense model.
        activation: a name of transformers' `ACT2FN`, "relu2" for example.

    Returns:
        the model.

    Raises:
        MoefyError: an unknown activation, or a MoEfied model; the model is unchanged then.
        UnsupportedModel: the config does not name the activation of an FFN, or its code calls a function instead;
            the model is unchanged then.

    Example:
        >>> relufy_(model)
        >>> Trainer(model, args, train_dataset=dataset, callbacks=[SparsityPenaltyCallback()]).train()
        >>> moefy_(model, MoEficationConfig(k=0.2), batches)
    """
    if activation not in ACT2FN:
        raise MoefyError(f"unknown activation {activation!r}; choose from {', '.join(sorted(ACT2FN))}")
    sites = find_sites(model)
    for site in sites:
        if is_routed(site.act):
            raise MoefyError(f"{site.name} is routed already; swap the activation before converting")
        if site.spec.function is not None:
            raise UnsupportedModel(f"{site.name}: its code calls {site.spec.function}, which nothing can replace")
    config = copy.deepcopy(model.config)
    changed = [_set_activation(part, activation) for part in deciding_configs(model, sites, config)]
    if not any(changed):
        raise UnsupportedModel(f"the config of {type(model).__name__} does not name its FFN activation")
    with torch.device("meta"):  # what loading a checkpoint with this config will build
        twin = dict(type(model)(copy.deepcopy(config)).named_modules())
    for site in sites:
        act = twin[f"{site.name}.{site.spec.act}".lstrip(".")]
        if type(act) is not type(ACT2FN[activation]):
            raise UnsupportedModel(f"{site.name}: the config does not decide its activation, which stays a {act}")
    for name, module in model.named_modules():
        if type(module).__module__ in _ACTIVATION_MODULES and repr(module) != repr(twin[name]):
            model.set_submodule(name, twin[name])
    for part, values in zip(deciding_configs(model, sites, model.config), changed, strict=True):
        for name, value in values.items():
            setattr(part, name, value)
    return model


def _set_activation(config: PreTrainedConfig, activation: str) -> dict[str, str]:
    """Set every field of a config that names an activation; return the fields and their values."""
    values = {name: activation for name in _ACTIVATION_FIELDS if isinstance(getattr(config, name, None), str)}
    if hasattr(config, "feed_forward_proj"):  # T5 derives its activation from this one when loaded
        gated = config.feed_forward_proj.startswith("gated-")
        values["feed_forward_proj"] = f"gated-{activation}" if gated else activation
    for name, value in values.items():
        setattr(config, name, value)
    return values


def square_hoyer(a: torch.Tensor) -> torch.Tensor:
    """Return (sum|a|)^2 / (f sum a^2), the share of neurons that are effectively active, in [1/f, 1] (D2DMoE).

    Args:
        a: (T, f) activations of the neurons.

    Returns:
        (T,) one share a token.
    """
    a = a.float()
    return a.abs().sum(-1).square() / (a.square().sum(-1) * a.shape[-1]).clamp_min(1e-12)


def l1(a: torch.Tensor) -> torch.Tensor:
    """Return mean |a| of each token.

    Args:
        a: (T, f) activations of the neurons.

    Returns:
        (T,) one mean a token.
    """
    return a.float().abs().mean(-1)


def density(a: torch.Tensor, sharpness: float = 10.0) -> torch.Tensor:
    """Return mean tanh(sharpness |a|), a smooth share of the neurons that fire (the density loss of DEFT).

    Args:
        a: (T, f) activations of the neurons.
        sharpness: the larger, the closer to a count; the default is ours.

    Returns:
        (T,) one share a token.
    """
    return torch.tanh(sharpness * a.float().abs()).mean(-1)


PENALTIES = {"square_hoyer": square_hoyer, "l1": l1, "density": density}


class SparsityPenaltyCallback(ExtraLossCallback):
    """Adds `weight` times the mean activity of all FFNs to the training loss.

    Padding does not count. Logs carry `sparsity_penalty`, the activity before `weight`.

    Args:
        penalty: "square_hoyer" (D2DMoE), "l1" or "density" (DEFT).
        weight: its factor, at least 0. The activity is a mean over tokens and layers, so one weight suits every width
            and depth.

    Raises:
        MoefyError: an unknown penalty or a negative weight; in training, when the model returns no loss.

    Example:
        >>> callback = SparsityPenaltyCallback("square_hoyer", weight=0.1)
        >>> Trainer(model, args, train_dataset=dataset, callbacks=[callback]).train()
    """

    name = "sparsity_penalty"

    def __init__(self, penalty: str = "square_hoyer", weight: float = 0.1):
        if penalty not in PENALTIES:
            raise MoefyError(f"unknown penalty {penalty!r}; choose from {', '.join(PENALTIES)}")
        super().__init__(weight)
        self.penalty = PENALTIES[penalty]
        self.values: list[torch.Tensor] = []

    def watch(self, model: PreTrainedModel) -> list:
        """Register a hook on every FFN; return the handles."""
        return [
            site.down.register_forward_pre_hook(lambda _, args, site=site: self.collect(model, site, args[0]))
            for site in find_sites(model)
        ]

    def begin(self) -> None:
        """Forget the activity of the batch before."""
        self.values = []

    def collect(self, model: PreTrainedModel, site: FfnSite, neurons: torch.Tensor) -> None:
        """Add the activity of one FFN on the batch, unless gradient checkpointing computes it again.

        Args:
            model: the model in training.
            site: the FFN.
            neurons: (..., f) activations of its neurons.
        """
        if site.owner.training:
            activity = self.penalty(neurons).flatten()  # (T,)
            real = real_tokens(model, site, self.batch, len(activity))
            value = activity.mean() if real is None else (activity * real).sum() / real.sum().clamp_min(1)
            if self.running:  # a checkpointed layer repeats the computation for its gradients, not for another value
                self.values.append(value)

    def value(self, model: PreTrainedModel, output: Any) -> torch.Tensor | None:
        """Return the mean activity of all FFNs on the batch, of shape ()."""
        return torch.stack(self.values).mean() if self.values else None
