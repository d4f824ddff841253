"""Mean compensation: an expert that does not run contributes what it does on average when it does not run."""

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..loading import check_moefied
from ..measure.profile import ModelProfile, check_sample
from ..measure.router_inputs import check_same_sample, inputs_from, select_experts
from ..measure.sample import FfnSample
from ..modeling.ffn_sites import FfnSite
from ..modeling.section import Section


@torch.no_grad()
def compensate_(model: PreTrainedModel, profile: ModelProfile, *, progress: bool = True) -> None:
    """Give every neuron that does not run its mean, at the selection the model has now, in place.

    It is that of G-MoEfication, section 3, with one difference: their means are over all tokens, which counts twice
    what selected experts add.

    With all experts selected nothing is compensated, and a model loaded as its dense self knows no means. For another
    budget, measure again.

    Args:
        profile: of this model's routed FFNs, with a sample; neurons may have been permuted since.

    Raises:
        MoefyError: the model is not MoEfied, or the profile is of another number of FFNs or has no sample. The model
            is unchanged then.

    Example:
        >>> with profile(model, batches) as sample:
        ...     compensate_(model, sample)
    """
    model = check_moefied(model)
    sites = model.moe_sites()
    check_sample(sites, profile)
    readers = inputs_from(sites)
    check_same_sample(sites, profile, readers)
    bar = tqdm(sites, desc="means", unit="layer", disable=not progress)
    for site, stats, read in zip(bar, profile.sites, readers, strict=True):
        means = means_of_dropped(site, stats.sample, profile.sites[read].sample)
        site.act.compensate_(means.to(site.device, site.down.weight.dtype))
    Section(model.config).compensation = True


def means_of_dropped(site: FfnSite, sample: FfnSample, read: FfnSample | None = None) -> torch.Tensor:
    """Return the mean activation (f,) of each neuron over the tokens for which its expert does not run.

    It is 0 where the expert always runs. `read` is of the FFN whose input the router reads, if that is another."""
    routed, weights = site.act, site.weights()
    sums = torch.zeros(weights.down.shape[1], dtype=torch.float64)
    counts = torch.zeros(routed.num_experts, dtype=torch.float64)
    for x, (_, neurons) in zip((sample if read is None else read).chunks(), sample.activations(weights), strict=True):
        keep = select_experts(routed, x.to(neurons.device))
        if keep is None:
            break
        experts = neurons.float().unflatten(-1, (routed.num_experts, routed.expert_size))
        sums += experts.masked_fill(keep.unsqueeze(-1), 0).sum(0, dtype=torch.float64).flatten().cpu()
        counts += (~keep).sum(0).cpu()
    return sums / counts.clamp_min(1).repeat_interleave(routed.expert_size)
