"""How many experts each threshold of the dynamic selections computes, layer by layer."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import MoefyError
from ..loading import MoefiedModel, check_moefied
from ..measure.contexts import hooked
from ..measure.padding import without_padding
from ..measure.profile import ModelProfile, check_sample, profile
from ..measure.router_inputs import inputs_from, scores_of
from ..measure.sample import FfnSample
from ..modeling.ffn_sites import FfnSite
from ..modeling.section import Section
from ..modeling.selection import SELECTIONS, Dynamic

TOKENS = 8192  # that a layer's table is measured on
STEPS = 32  # of a table: shares of the routed experts, evenly spaced


def calibrate_thresholds_(
    model: PreTrainedModel,
    data: Iterable[Mapping[str, Any]] | ModelProfile,
    kinds: Iterable[str] | None = None,
    *,
    progress: bool = True,
) -> None:
    """Measure how many experts every threshold of the dynamic selections computes, and keep it in the model's config.

    A budget can be asked for then instead of a threshold, also after saving and loading.

    Args:
        data: model-ready batches, run at the selection the model has now; or a profile of this model that keeps a
            sample.
        kinds: of selections; all dynamic ones by default.

    Raises:
        MoefyError: the model is not MoEfied, an unknown selection (the valid ones are listed) or one that is not
            dynamic, no data, or a profile of other FFNs or without a sample.

    Example:
        >>> calibrate_thresholds_(model, batches, ["threshold"])
        >>> model.set_selection(type="threshold", k=0.25)
    """
    model = check_moefied(model)
    dynamic = {name: cls for name, cls in SELECTIONS.items() if issubclass(cls, Dynamic)}
    kinds = list(dynamic if kinds is None else kinds)
    for kind in kinds:
        if kind not in dynamic:
            raise MoefyError(f"unknown dynamic selection {kind!r}; choose from {', '.join(dynamic)}")
    if not kinds:
        return
    if not isinstance(data, ModelProfile):
        layers = Section(model.config).layers
        with profile(model, data, max_tokens=TOKENS, layers=layers, progress=progress) as sampled:
            calibrate_thresholds_(model, sampled, kinds)
        return
    shares = [step / STEPS for step in range(STEPS + 1)]
    tables: dict[str, list[list[float]]] = {kind: [] for kind in kinds}
    sites = model.moe_sites()
    check_sample(sites, data)
    for site, read in zip(sites, inputs_from(sites), strict=True):
        strengths = sampled_strengths(site, data.sites[read].sample)
        for kind in kinds:
            needs = dynamic[kind].needs(strengths).flatten().sort().values
            places = [round(share * (len(needs) - 1)) for share in shares]
            tables[kind].append([float(f"{float(needs[place]):.5g}") for place in places])
    section = Section(model.config)
    section.thresholds = {**section.thresholds, "share": shares, **tables}


@torch.no_grad()
def sampled_strengths(site: FfnSite, sample: FfnSample) -> torch.Tensor:
    """Return the routing weights (T, E - S) of an FFN's router on the first tokens of a sample of what it reads."""
    router, inputs = site.act.router, sample.inputs[:TOKENS].to(site.device)
    return router.strengths(scores_of(router, inputs)).float().cpu()


@contextmanager
def counted_experts(model: MoefiedModel, batch: Mapping[str, Any], counts: dict[str, list[float]]) -> Iterator[None]:
    """Add to `counts`, by the key of the FFN, the [experts computed, tokens] of the forward passes within; padding
    is left out."""

    def count(site: FfnSite, scores: torch.Tensor) -> None:
        keep = without_padding(model, site, batch, site.act.chosen(scores))  # (T, E)
        both = counts.setdefault(site.key, [0.0, 0.0])
        both[0] += float(keep.sum())
        both[1] += len(keep)

    handles = [
        site.act.router.register_forward_hook(lambda _, args, scores, site=site: count(site, scores))
        for site in model.moe_sites()
    ]
    with hooked(handles):
        yield
