"""All experts together are the dense model: that is checked by running it, so that no wrong match gets through."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..errors import UnsupportedModel
from ..loading import check_moefied
from ..measure.contexts import all_experts, evaluating, hooked
from ..measure.made_up_inputs import made_up_batch
from ..measure.metrics import is_causal
from ..measure.profile import ModelProfile
from ..modeling.ffn_sites import FfnSite
from ..modeling.moefied import is_moefied
from ..modeling.offload import device_of, is_offloaded

logger = logging.get_logger("moefy_hf")

ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-8, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # of the largest
ROWS = 64  # tokens for which one FFN is computed again


class DenseReference:
    """What a model computes before it is changed.

    It runs on one batch. Where that does not get to an FFN, as a text does not get to a vision tower, the tower that
    has it is run by itself, on a batch that is made up.

    Args:
        model: the model; where it is MoEfied already, it runs with all experts, whatever its budget.
        sites: the FFNs that are to be converted; each is compared with its formula, too.
        profile: whose first batch is taken; without one, a batch is made up.

    Raises:
        UnsupportedModel: an FFN does not compute what it was taken for.
    """

    def __init__(self, model: PreTrainedModel, sites: list[FfnSite], profile: ModelProfile | None):
        self.moefied = model if is_moefied(model) else None
        self.batches = {model: _first_rows(profile.batches[0]) if profile and profile.batches else _made_up(model)}
        self.missed = list(sites)
        self.outputs = {model: self._run(model)}
        for tower in dict.fromkeys(_tower_around(model, site) for site in self.missed):
            if tower is not model:
                self.batches[tower] = _made_up(tower)
                self.outputs[tower] = self._run(tower)

    def compare(self, when: str) -> None:
        """Check that the model computes what it did.

        Args:
            when: what was done since, for the message.

        Raises:
            UnsupportedModel: it does not.
        """
        self.missed = []
        for model, outputs in self.outputs.items():
            for position, (now, before) in enumerate(zip(self._run(model), outputs, strict=True)):
                finite = before.isfinite()
                if not finite.any():
                    continue
                scale = before[finite].abs().max().clamp_min(1e-12)
                off = (now[finite].float() - before[finite].float()).abs().nan_to_num(torch.inf).max() / scale
                if off > 10 * ROUNDING[before.dtype]:
                    raise UnsupportedModel(
                        f"after {when} all experts together are not the dense {type(model).__name__}: its output "
                        f"{position} differs by {float(off):.1e} of its scale; the model is as it was"
                    )

    @torch.no_grad()
    def _run(self, model: PreTrainedModel) -> list[torch.Tensor]:
        """Return a model's outputs; FFNs that nobody has compared with their formula are, where they run."""
        if (batch := self.batches[model]) is None:
            return []
        seen: dict[int, torch.Tensor] = {}
        sites, ran, hooks = self.missed, set[int](), []

        def check(position: int, neurons: torch.Tensor) -> None:
            if position in seen:
                ran.add(position)
                check_formula(sites[position], seen.pop(position), neurons)

        for position, site in enumerate(sites):
            hooks.append(site.first.register_forward_pre_hook(lambda _, a, i=position: seen.__setitem__(i, a[0])))
            hooks.append(site.down.register_forward_pre_hook(lambda _, a, i=position: check(i, a[0])))
        device = device_of(model)
        batch = {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
        devices = [device] if device.type == "cuda" else []
        run: torch.nn.Module = model
        if is_offloaded(model) and is_causal(model):  # the head, which nothing has changed, is the largest of all
            run, batch = model.base_model, {key: value for key, value in batch.items() if key != "labels"}
        complete = all_experts(check_moefied(model)) if model is self.moefied else nullcontext()
        with complete, evaluating(model), hooked(hooks), torch.random.fork_rng(devices):
            torch.manual_seed(0)
            outputs = [tensor.clone() for tensor in tensors_of(run(**batch)) if tensor.is_floating_point()]
        self.missed = [site for position, site in enumerate(sites) if position not in ran]
        return outputs


def _tower_around(model: PreTrainedModel, site: FfnSite) -> PreTrainedModel:
    """Return the outermost model that has an FFN, below the whole that is converted; that one where there is none."""
    module: Any = model
    for part in site.name.split("."):
        module = getattr(module, part)
        if isinstance(module, PreTrainedModel) and module is not model.base_model:
            return module
    return model


def check_formula(site: FfnSite, x: torch.Tensor, neurons: torch.Tensor) -> None:
    """Check that an FFN makes of its input (..., d) what its layout says: neurons (..., f).

    Raises:
        UnsupportedModel: it computes something else.
    """
    if not neurons.numel():  # none of the batch's tokens is of the kind that this FFN is for
        return
    x, neurons = x.reshape(-1, x.shape[-1])[:ROWS], neurons.reshape(-1, neurons.shape[-1])[:ROWS]
    expected = site.weights().neurons(x) if len(x) == len(neurons) else None
    scale = neurons.abs().max().clamp_min(1e-12)
    if expected is None or not _close(expected, neurons, scale):
        raise UnsupportedModel(
            f"{site.name}: this {type(site.owner).__name__} does not compute {site.spec.down}({site.spec.act}("
            f"{site.spec.gate or site.spec.up}(x)){' * ' + site.spec.up + '(x)' if site.spec.gate else ''}); "
            "convert other FFNs (layers=...)"
        )


def _close(a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor) -> bool:
    rounding = ROUNDING.get(b.dtype, 1e-4)
    a, b = a.float(), b.float()
    finite = a.isfinite() & b.isfinite()
    return bool(((a - b)[finite].abs() <= rounding * scale.float()).all())


def _first_rows(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the first rows of a batch of texts, and others as they are."""
    rows = {len(value) for value in batch.values() if torch.is_tensor(value) and value.dim()}
    if "input_ids" in batch and len(rows) == 1 and all(torch.is_tensor(value) for value in batch.values()):
        return {key: value[:2] if value.dim() else value for key, value in batch.items()}
    return batch


def _made_up(model: PreTrainedModel) -> Mapping[str, Any] | None:
    try:
        return made_up_batch(model)
    except UnsupportedModel as error:
        logger.warning_once(f"whether all experts together are the dense model was not checked: {error}")
        return None


def tensors_of(output: Any) -> list[torch.Tensor]:
    """Return the tensors of a model's output, nested in whatever it consists of."""
    if torch.is_tensor(output):
        return [output]
    if isinstance(output, Mapping):
        output = [*output.values()]
    return [tensor for each in output for tensor in tensors_of(each)] if isinstance(output, list | tuple) else []
