"""Fit routers to what the experts really do, layer by layer, on the sampled FFN inputs of a profile.

One layer's tokens are read from disk in chunks, so memory does not grow with their number; a layer's router never sees
another layer, so any of them may be fitted again by itself.
"""

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .modeling.ffn_sites import FfnSite
from .modeling.router_base import Router
from .modeling.selection import SELECTIONS
from .profiling import CHUNK, ModelProfile, SiteProfile, TensorFile, check_sample
from .reach import measure_reach

HELD_OUT = 0.1  # share of the tokens that measures the fit: the last ones, so of other texts than the rest
BATCH = 512  # tokens per step, as in the paper


@dataclass(frozen=True)
class RouterFit:
    """How well one layer's router finds the experts that matter, on tokens it was not fitted on.

    `captured`, `oracle` and `random` are the share of the router's target, summed over all experts, that the k best
    experts by the router, by the target itself and by chance hold (captured mass, where the target is the activation
    mass).
    """

    name: str
    k: int
    captured: float
    oracle: float
    random: float
    best_epoch: int

    def to_dict(self) -> dict:
        return asdict(self)


def tokens_needed(hidden_size: int, num_experts: int) -> int:
    """Fewer tokens than this cannot tell a router of this size anything."""
    return 2 * max(hidden_size, num_experts)


def fit_routers(
    model: PreTrainedModel,
    profile: ModelProfile,
    *,
    epochs: int = 10,
    lr: float = 0.003,
    seed: int = 0,
    progress: bool = True,
) -> list[RouterFit]:
    """Train every layer's router, in place, on the profile's sample; the best epoch by held-out captured share is
    kept. What dynamic selections spend is measured anew where it was known.

    Routers that are not trainable ("analytic", "similarity", ...) are measured only.

    Args:
        profile: of this model's routed FFNs, with a sample; neurons may have been permuted since.
        epochs: passes over the sample, learning rate `lr` (Adam) falling to zero along a cosine.

    Raises:
        ValueError: the profile belongs to another number of FFNs, has no sample, or holds too few tokens (says how
            many are needed).
    """
    sites = model.moe_sites()
    check_sample(sites, profile)
    for site, stats in zip(sites, profile.sites, strict=True):
        needed = tokens_needed(site.sizes[0], site.act.router.num_experts) if site.act.router.trainable else 1
        if stats.tokens < needed:
            raise ValueError(
                f"{site.name}: {stats.tokens} calibration tokens cannot fit a router; at least {needed} are needed"
            )
    fits = []
    for site, stats in zip(
        tqdm(sites, desc="routers", unit="layer", disable=not progress), profile.sites, strict=True
    ):
        directory = Path(profile.directory.name)
        with (
            torch.enable_grad(),
            torch.autocast(site.down.weight.device.type, enabled=False),
        ):  # targets and losses in full precision
            fits.append(_fit_layer(site, stats, directory, epochs, lr, torch.Generator().manual_seed(seed)))
    if measured := [kind for kind in model.config.moefication.get("reach", ()) if kind in SELECTIONS]:
        measure_reach(model, profile, measured)  # what the old routers spent says nothing of the new ones
        model.set_selection()
    return fits


def _fit_layer(
    site: FfnSite, stats: SiteProfile, directory: Path, epochs: int, lr: float, generator: torch.Generator
) -> RouterFit:
    router: Router = site.act.router
    inputs = stats.inputs
    assert inputs is not None, "fit_routers checks that there is a sample"
    targets = _targets(site, stats, directory / "targets.bin")
    fitting = len(inputs) - max(1, int(len(inputs) * HELD_OUT))
    experts, k = router.num_experts, site.act.selection.k
    k = max(1, experts // 5 if k is None else min(round(k), experts // 5))  # the paper's 20 %, or less
    held_out = inputs[fitting:], targets[fitting:]
    device = site.down.weight.device
    best, best_epoch, best_weights = _captured(router, device, *held_out, k), 0, copy.deepcopy(router.state_dict())
    if router.trainable and epochs:
        steps = epochs * sum(1 for _ in _batches(inputs[:fitting], targets[:fitting], None))
        optimizer = torch.optim.Adam(router.parameters(), lr=lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        router.requires_grad_(True)
        for epoch in range(1, epochs + 1):
            for x, y in _batches(inputs[:fitting], targets[:fitting], generator):
                optimizer.zero_grad()
                router.loss(router(x.to(device)), y.to(device)).backward()
                optimizer.step()
                schedule.step()
            captured = _captured(router, device, *held_out, k)
            if captured > best:
                best, best_epoch, best_weights = captured, epoch, copy.deepcopy(router.state_dict())
        optimizer.zero_grad()  # or the first step of an optimizer over all parameters would still move the router
        router.requires_grad_(False)
        router.load_state_dict(best_weights)
    return RouterFit(site.name, k, best, _share(held_out[1], held_out[1], k), k / experts, best_epoch)


def _targets(site: FfnSite, stats: SiteProfile, path: Path) -> torch.Tensor:
    """(T, E - S) in a file: what each routed expert does on each sampled token."""
    routed, weights = site.act, site.weights()
    down = weights.down.detach().unflatten(-1, (routed.num_experts, routed.expert_size))[:, routed.shared :]
    file = TensorFile(path)
    for _, neurons in stats.activations(weights):
        experts = neurons.unflatten(-1, (routed.num_experts, routed.expert_size))[:, routed.shared :]
        file.append(routed.router.targets(experts, down).float())
    return file.mapped()


def _batches(
    inputs: torch.Tensor, targets: torch.Tensor, generator: torch.Generator | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches (t, d), (t, E); shuffled chunk by chunk, so that the files are read in long runs."""
    starts = torch.arange(0, len(inputs), CHUNK)
    if generator is not None:
        starts = starts[torch.randperm(len(starts), generator=generator)]
    for start in starts.tolist():
        x, y = inputs[start : start + CHUNK], targets[start : start + CHUNK]
        order = torch.arange(len(x)) if generator is None else torch.randperm(len(x), generator=generator)
        for rows in order.split(BATCH):
            yield x[rows], y[rows]


@torch.no_grad()
def _captured(router: Router, device: torch.device, inputs: torch.Tensor, targets: torch.Tensor, k: int) -> float:
    scores = torch.cat([router(x.to(device)).cpu() for x in inputs.split(CHUNK)])
    return _share(scores, targets, k)


def _share(scores: torch.Tensor, targets: torch.Tensor, k: int) -> float:
    """Share of the targets (T, E) that the k best experts by `scores` (T, E) hold."""
    return float(targets.gather(-1, scores.topk(k, dim=-1).indices).sum() / targets.sum().clamp_min(1e-12))
