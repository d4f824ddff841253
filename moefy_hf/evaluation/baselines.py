"""Training-free sparsity at the level of neurons, what one would try instead of experts, as rows of a sweep.

Each baseline leaves out the entries of some tensors of a dense FFN that lie below a threshold. Thresholds are
quantiles on calibration data, one per tensor, of the same share in every layer (TEAL's searched budgets are left out).

- "cats" (CATS): |act(gate x)|; the gate is computed exactly and so counts in full, as does `up` in an ungated FFN.
- "teal" (TEAL): the magnitude of each matrix' inputs.
- "wina" (WINA): that magnitude times the norm of the matrix' column which an input meets.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..errors import MoefyError
from ..loading import MoefiedModel, is_inline, routed
from ..measure.contexts import all_experts, hooked
from ..measure.flops import ModelFlops, ffn_flops
from ..measure.metrics import Quality, predictions
from ..measure.padding import without_padding
from ..measure.processes import ALONE, Processes
from ..measure.progress import shared_batches
from ..modeling.ffn_sites import FfnSite, find_sites
from ..modeling.selection_config import count_experts

logger = logging.get_logger("moefy_hf")

CALIBRATION_TOKENS = 4096
DRAWN = 2**14  # scores drawn of each tensor of each calibration batch


@dataclass
class Place:
    """A tensor (..., n) of an FFN whose small entries are left out: the output of `module`, or else its input.

    Attributes:
        output: whether it is the output.
        weight: (n,) factor of an entry's magnitude; None for 1.
        flops: per token, of what multiplies the tensor.
        threshold: entries whose score is not above it are left out.
        drawn: scores of entries on calibration data.
        computed, seen: entries of real tokens above the threshold, and all of them.
    """

    site: FfnSite
    module: nn.Module
    output: bool
    weight: torch.Tensor | None
    flops: int
    threshold: float = 0.0
    drawn: list[torch.Tensor] = field(default_factory=list, repr=False)
    computed: int = 0
    seen: int = 0

    def score(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return how much each entry of a tensor (..., n) counts."""
        magnitude = tensor.detach().float().abs()
        return magnitude if self.weight is None else magnitude * self.weight

    def at(self, share: float) -> "Place":
        """Return this place with the threshold that `share` of the calibration entries exceed."""
        threshold = 0.0
        if share < 1:
            entries = torch.cat(self.drawn).sort().values  # more of them, maybe, than torch.quantile takes
            threshold = float(entries[round((1 - share) * (len(entries) - 1))])
        return replace(self, threshold=threshold, computed=0, seen=0)


def column_norms(*rows: torch.Tensor) -> torch.Tensor:
    """Return the norms (n,) of the columns of one Linear, whose rows (f, n) may come in parts."""
    return torch.stack([part.detach().float().square().sum(0) for part in rows]).sum(0).sqrt()


def places_of(site: FfnSite, baseline: str) -> list[Place]:
    """Return where a baseline leaves entries out in one FFN.

    Raises:
        MoefyError: the baseline changes what an activation gives, and the FFN's code calls a function instead.
    """
    weights, (d, f) = site.weights(), site.sizes
    up = (weights.up,) if weights.gate is None else (weights.gate, weights.up)
    if baseline == "cats":  # `down` depends on it, and `up` in a gated FFN
        if is_inline(site):
            raise MoefyError(f"cats changes what an activation gives; the code of {site.name} calls a function")
        return [Place(site, site.act, True, None, 2 * d * f * len(up))]
    linears: list[tuple[Any, tuple[torch.Tensor, ...]]] = [(site.down, (weights.down,))]
    linears += [(site.up, up)] if site.gate is None else [(site.gate, up[:1]), (site.up, up[1:])]
    return [
        Place(site, linear, False, column_norms(*rows) if baseline == "wina" else None, 2 * d * f * len(rows))
        for linear, rows in linears
    ]


@contextlib.contextmanager
def places_shown_to(
    places: Sequence[Place], handle: Callable[[Place, torch.Tensor], torch.Tensor | None]
) -> Iterator[None]:
    """Show each place's tensor to `handle` for a while, which may return another one to go on with."""

    def on_input(place: Place, args: tuple) -> tuple | None:
        changed = handle(place, args[0])
        return None if changed is None else (changed, *args[1:])

    hooks = []
    for place in places:
        if place.output:
            hook = place.module.register_forward_hook(lambda _, args, out, place=place: handle(place, out))
        else:
            hook = place.module.register_forward_pre_hook(lambda _, args, place=place: on_input(place, args))
        hooks.append(hook)
    with hooked(hooks):
        yield


def calibrate_(model: MoefiedModel, places: Sequence[Place], batches: Iterable[Mapping[str, Any]]) -> None:
    """Draw scores of every place while the dense model reads some thousand tokens.

    Raises:
        MoefyError: `batches` hold no token.
    """
    generator, tokens = torch.Generator().manual_seed(0), 0
    current: Mapping[str, Any] = {}

    def draw(place: Place, tensor: torch.Tensor) -> None:
        nonlocal tokens
        rows = without_padding(model, place.site, current, place.score(tensor))
        tokens += len(rows) if place is places[0] else 0
        if rows.numel():
            index = torch.randint(rows.numel(), (min(DRAWN, rows.numel()),), generator=generator)
            place.drawn.append(rows.flatten()[index.to(rows.device)].cpu())

    with places_shown_to(places, draw):
        for current in batches:
            predictions(model, current)
            if tokens >= CALIBRATION_TOKENS:
                break
    if not tokens:
        raise MoefyError("there is nothing to calibrate neuron-level baselines on: no batch held a token")


@contextlib.contextmanager
def left_out(model: MoefiedModel, places: Sequence[Place], batch: Mapping[str, Any]) -> Iterator[None]:
    """Zero what lies below the places' thresholds for a while, and count what does not."""

    def zero(place: Place, tensor: torch.Tensor) -> torch.Tensor:
        keep = place.score(tensor) > place.threshold  # exact zeros cost nothing either
        counted = without_padding(model, place.site, batch, keep)
        place.computed, place.seen = place.computed + int(counted.sum()), place.seen + counted.numel()
        return tensor.masked_fill(~keep, 0)

    with places_shown_to(places, zero):
        yield


def places_at(calibrated: Mapping[str, Sequence[Place]], name: str, k: int | float) -> list[Place] | None:
    """Return a baseline's places, with thresholds by which each FFN computes as much of its weights as k experts are.

    Where a baseline computes more than that in any case, None is returned, and a warning logged.

    Args:
        calibrated: a baseline's name -> its places in all FFNs, with drawn scores.
        k: as `set_selection` takes it.
    """
    places = []
    for place in calibrated[name]:
        act = routed(place.site)
        unused = 1 - count_experts(k, act.num_experts, act.shared) / act.num_experts
        sparse = sum(other.flops for other in calibrated[name] if other.site is place.site) / ffn_flops(place.site)
        if unused >= sparse:
            logger.warning(f"{name} computes {1 - sparse:.0%} of {place.site.name} in any case: no row for k={k}")
            return None
        places.append(place.at(1 - unused / sparse))
    return places


def computed_flops(flops: ModelFlops, sites: Sequence[FfnSite], places: Sequence[Place]) -> float:
    """Return the FLOPs per token of all FFNs without what was left out.

    Comparing with thresholds, some d + f of 2 d f, is not counted.
    """
    saved: dict[str, float] = {}
    for place in places:
        unneeded = place.flops * (1 - place.computed / max(place.seen, 1))
        saved[place.site.key] = saved.get(place.site.key, 0.0) + unneeded
    costs = (ffn_flops(site) - saved.get(site.key, 0.0) for site in sites)
    return sum(tokens * cost for tokens, cost in zip(flops.tokens, costs, strict=True))


@torch.no_grad()
def baseline_rows(
    model: MoefiedModel,
    batches: Iterable[Mapping[str, Any]],
    calibration: Iterable[Mapping[str, Any]],
    baselines: Sequence[str],
    budgets: Sequence[int | float],
    flops: ModelFlops,
    progress: bool = True,
    processes: Processes = ALONE,
) -> list[dict[str, Any]]:
    """Return rows of a sweep as `evaluate` has them, of the dense self of a MoEfied model in evaluation mode.

    `ffn_flops` are those of the entries that were computed on `batches`, not those that the thresholds aimed at.

    Args:
        baselines: names, see the head of this file.
        budgets: k as `set_selection` takes it: as much of the weights is computed as k experts are.
        flops: of the dense model.
        processes: that share the batches, of which all have all.

    Raises:
        MoefyError: `calibration` or `batches` hold no token, or see `places_of`.
    """
    with all_experts(model):
        sites = model.moe_sites()
        calibrated = {name: [place for site in sites for place in places_of(site, name)] for name in baselines}
        calibrate_(model, [place for places in calibrated.values() for place in places], calibration)
        possible = {(name, k): places_at(calibrated, name, k) for name in baselines for k in budgets}
        points = {key: places for key, places in possible.items() if places is not None}

        def measured() -> list[Any]:
            qualities = [Quality() for _ in points]
            for batch in shared_batches(batches, "neuron-level baselines", processes, progress):
                dense, labels = predictions(model, batch)
                for places, quality in zip(points.values(), qualities, strict=True):
                    with left_out(model, places, batch):
                        quality.update_(predictions(model, batch)[0], dense, labels)
            counts = [[(place.computed, place.seen) for place in places] for places in points.values()]
            return [*qualities, *(torch.tensor(each) for each in counts)]

        sums = processes.added(measured)
    rows = []
    for ((name, k), places), quality, counts in zip(
        points.items(), sums[: len(points)], sums[len(points) :], strict=True
    ):
        for place, (computed, seen) in zip(places, counts.tolist(), strict=True):
            place.computed, place.seen = computed, seen
        ffn, whole = flops.ratio(computed_flops(flops, find_sites(model), places))
        row: dict[str, Any] = {"router": name, "type": "neurons", "k": k, "allocation": "uniform"}
        rows.append(row | {"ffn_flops": ffn, "model_flops": whole} | quality.figures())
    return rows
