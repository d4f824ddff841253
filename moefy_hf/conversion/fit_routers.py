"""Fit routers to what the experts really do, layer by layer, on the sampled FFN inputs of a profile.

One layer's tokens are read from disk in chunks, so memory does not grow with their number; a layer's router never sees
another layer, so any of them may be fitted again by itself. A router that scores for several layers is fitted to the
mean of what it should be for each of them.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import MoefyError
from ..loading import check_moefied
from ..measure.processes import ALONE, Processes
from ..measure.profile import ModelProfile, check_sample
from ..measure.router_inputs import check_same_sample, inputs_from, scores_of
from ..measure.sample import CHUNK
from ..modeling.ffn_sites import FfnSite
from ..modeling.router_base import Router
from ..modeling.section import Section
from ..modeling.selection import SELECTIONS
from .expert_matching import expert_targets, shares_of
from .thresholds import calibrate_thresholds_
from .work import Found, Work, each_layer

HELD_OUT = 0.1  # share of the tokens that measures the fit: the last ones, so of other texts than the rest
BATCH = 512  # tokens per step, as in the paper


@dataclass(frozen=True)
class RouterFit:
    """How well one layer's router finds that layer's experts that matter, on tokens it was not fitted on.

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


def fit_routers_(
    model: PreTrainedModel,
    profile: ModelProfile,
    *,
    epochs: int = 10,
    lr: float = 0.003,
    seed: int = 0,
    work: Work | None = None,
    progress: bool = True,
    processes: Processes = ALONE,
) -> list[RouterFit]:
    """Train every layer's router, in place, on the profile's sample.

    The best epoch by held-out captured share is kept. What thresholds compute is measured anew where it was known.

    Routers that are not trainable ("analytic", "similarity", ...) are measured only.

    Args:
        profile: of this model's routed FFNs, with a sample; neurons may have been permuted since.
        epochs: passes over the sample, learning rate `lr` (Adam) falling to zero along a cosine.
        work: keeps the routers that are fitted, and has those that were.
        processes: that share the layers, each with the same model and profile.

    Raises:
        MoefyError: the model is not MoEfied; or the profile belongs to another number of FFNs, has no sample, or holds
            too few tokens (says how many are needed), or other tokens of layers that one router scores for.

    Example:
        >>> with profile(model, batches) as sample:
        ...     fits = fit_routers_(model, sample, epochs=20)
    """
    model = check_moefied(model)
    sites = model.moe_sites()
    readers = _check_fittable(sites, profile)
    fits: dict[int, RouterFit] = {}

    def fit(position: int) -> Found:
        fitted = _fit_one(sites, profile, readers, fits, position, epochs=epochs, lr=lr, seed=seed)
        return sites[position].act.router.state_dict(), fitted.to_dict()

    def take(position: int, fitted: Found) -> None:
        tensors, facts = fitted
        sites[position].act.router.load_state_dict(tensors)
        fits[position] = RouterFit(**facts)

    options: dict[str, Any] = {"work": work, "processes": processes, "progress": progress}
    each_layer("router", len(sites), fit, take, apart=readers == [*range(len(sites))], **options)
    if measured := [kind for kind in Section(model.config).thresholds if kind in SELECTIONS]:
        calibrate_thresholds_(model, profile, measured)  # what the old routers spent says nothing of the new ones
        model.set_selection()
    return [fits[position] for position in range(len(sites))]


def _check_fittable(sites: Sequence[FfnSite], profile: ModelProfile) -> list[int]:
    """Return for each FFN the position of the one whose input its router reads.

    Raises:
        MoefyError: as `fit_routers_`.
    """
    check_sample(sites, profile)
    readers = inputs_from(sites)
    check_same_sample(sites, profile, readers)
    for site, stats in zip(sites, profile.sites, strict=True):
        if any(each.is_meta for each in site.act.router.parameters()):
            raise MoefyError(f"{site.name}: its router is offloaded, and cannot be fitted there: load it into memory")
        needed = tokens_needed(site.sizes[0], site.act.router.num_experts) if site.act.router.trainable else 1
        if stats.tokens < needed:
            raise MoefyError(
                f"{site.name}: {stats.tokens} calibration tokens cannot fit a router; at least {needed} are needed"
            )
    return readers


def _fit_one(
    sites: Sequence[FfnSite],
    profile: ModelProfile,
    readers: Sequence[int],
    fits: Mapping[int, RouterFit],
    position: int,
    *,
    epochs: int,
    lr: float,
    seed: int,
) -> RouterFit:
    """Train the router of the FFN at a position, if it has one of its own, and measure it."""
    site, read = sites[position], readers[position]
    inputs = profile.sites[read].sample.inputs
    with torch.enable_grad(), torch.autocast(site.device.type, enabled=False):  # targets and losses in full precision
        targets = _targets(sites, profile, position)
        best_epoch = fits[read].best_epoch if read < position else 0
        if read == position and site.act.router.trainable and epochs:
            led = [each for each, other in enumerate(readers) if other == position]
            aim = targets if len(led) == 1 else _mean_shares(sites, profile, led)
            best_epoch = _fit(site, inputs, aim, epochs, lr, torch.Generator().manual_seed(seed))
        held_out, k = _held_out(len(inputs)), _measured_k(site)
        captured = _captured(sites[read], inputs[held_out:], targets[held_out:], k)
        oracle = _share(targets[held_out:], targets[held_out:], k)
    return RouterFit(site.name, k, captured, oracle, k / targets.shape[1], best_epoch)


def _held_out(tokens: int) -> int:
    """Where the tokens begin that measure the fit."""
    return tokens - max(1, int(tokens * HELD_OUT))


def _measured_k(site: FfnSite) -> int:
    experts, k = site.act.router.num_experts, site.act.selection.k
    return max(1, experts // 5 if k is None else min(round(k), experts // 5))  # the paper's 20 %, or less


def _fit(
    site: FfnSite, inputs: torch.Tensor, targets: torch.Tensor, epochs: int, lr: float, generator: torch.Generator
) -> int:
    """Train one router on inputs (T, d) and targets (T, E), and keep its best epoch, which is returned."""
    router: Router = site.act.router
    fitting, k, device = _held_out(len(inputs)), _measured_k(site), site.device
    held_out = inputs[fitting:], targets[fitting:]
    best, best_epoch, best_weights = _captured(site, *held_out, k), 0, copy.deepcopy(router.state_dict())
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
        captured = _captured(site, *held_out, k)
        if captured > best:
            best, best_epoch, best_weights = captured, epoch, copy.deepcopy(router.state_dict())
    optimizer.zero_grad()  # or the first step of an optimizer over all parameters would still move the router
    router.requires_grad_(False)
    router.load_state_dict(best_weights)
    return best_epoch


def _chunks_of_targets(sites: Sequence[FfnSite], profile: ModelProfile, position: int) -> Iterator[torch.Tensor]:
    site, act = sites[position], sites[position].act
    return expert_targets(
        site.weights(), profile.sites[position].sample, act.num_experts, act.shared, act.router.targets
    )


def _targets(sites: Sequence[FfnSite], profile: ModelProfile, position: int) -> torch.Tensor:
    """(T, E - S) in a file: what each routed expert of an FFN does on each sampled token."""
    file = profile.file("targets.bin")
    for targets in _chunks_of_targets(sites, profile, position):
        file.append(targets)
    return file.mapped()


def _mean_shares(sites: Sequence[FfnSite], profile: ModelProfile, positions: Sequence[int]) -> torch.Tensor:
    """(T, E - S) in a file: the mean over FFNs of the share that the experts with a number have of all targets. Their
    cross-entropy with a router is the mean of that of each FFN."""
    file = profile.file("shares.bin")
    first, *others = positions
    for targets in _chunks_of_targets(sites, profile, first):
        file.append(shares_of(targets) / len(positions))
    mean = file.mapped()
    for position in others:
        for sums, targets in zip(mean.split(CHUNK), _chunks_of_targets(sites, profile, position), strict=True):
            sums += shares_of(targets).cpu() / len(positions)
    return mean


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
def _captured(site: FfnSite, inputs: torch.Tensor, targets: torch.Tensor, k: int) -> float:
    router, device = site.act.router, site.device
    scores = torch.cat([scores_of(router, x.to(device)).cpu() for x in inputs.split(CHUNK)])
    return _share(scores, targets, k)


def _share(scores: torch.Tensor, targets: torch.Tensor, k: int) -> float:
    """Share of the targets (T, E) that the k best experts by `scores` (T, E) hold."""
    return float(targets.gather(-1, scores.topk(k, dim=-1).indices).sum() / targets.sum().clamp_min(1e-12))
