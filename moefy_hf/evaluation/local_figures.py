"""What a selection keeps of each FFN by itself, given the dense model's inputs."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ..loading import MoefiedModel, routed
from ..measure.contexts import all_experts
from ..measure.hooks import run_with_hooks
from ..measure.router_inputs import RouterInputs, scores_of
from ..modeling.routed_activation import chosen as select_experts
from .sweep_points import SweepPoint

NAMES = ("captured_mass", "output_error", "chunk_share")
CHUNK = 8  # consecutive tokens


def local_figures(
    model: MoefiedModel, batches: Iterable[Mapping[str, Any]], points: Sequence[SweepPoint], max_tokens: int
) -> list[list[dict[str, float]]]:
    """Measure what each point of a sweep keeps of each FFN, given the dense model's inputs.

    Returns:
        one list of FFNs per point, with

        - `captured_mass`: the share of the summed positive activations (MoEfication's measure);
        - `output_error`: the squared norm of what the dropped experts would have added, relative to the FFN's output
          without bias;
        - `chunk_share`: the share of experts that at least one of 8 consecutive tokens of a text needs (BlockFFN),
          which decides batched and speculative speed; absent where no text has 8 tokens.
    """
    sites = model.moe_sites()
    acts = [routed(site) for site in sites]
    inputs = RouterInputs(sites)
    routings = []
    for point in points:
        with point.on(model):
            routings.append([(act.router, act.selection) for act in acts])
    sums = torch.zeros(len(points), len(sites), len(NAMES), dtype=torch.float64)
    totals = torch.zeros(len(sites), len(NAMES), dtype=torch.float64)
    tokens = 0

    def see(position: int, x: torch.Tensor, neurons: torch.Tensor, text: torch.Tensor) -> None:
        nonlocal tokens
        tokens += len(x) * (position == 0)
        act, down = acts[position], sites[position].weights().down
        experts = neurons.unflatten(-1, (act.num_experts, -1))  # (T, E, m)
        mass = experts.clamp_min(0).sum(-1, dtype=torch.float32)
        chunks = chunks_of(text, CHUNK)  # (C, 8)
        output = F.linear(neurons, down).float().square().sum()
        totals[position] += torch.tensor([float(mass.sum()), float(output), len(chunks) * act.num_experts])
        read = inputs.of(position, x)
        for point, routing in enumerate(routings):
            router, selection = routing[position]
            scores = scores_of(router, read if router is act.router else x)  # a control reads its own FFN's input
            expert_mask = select_experts(scores, router, selection, act.shared)  # (T, E)
            rest = F.linear(experts.masked_fill(expert_mask.unsqueeze(-1), 0).flatten(-2), down).float()
            union = expert_mask[chunks].any(1).sum()
            captured = float((mass * expert_mask).sum())
            sums[point, position] += torch.tensor([captured, float(rest.square().sum()), int(union)])

    with all_experts(model), run_with_hooks(model, sites, see) as run:
        for batch in batches:
            run(batch)
            if tokens >= max_tokens:
                break
    figures = sums / totals.clamp_min(1e-30)
    names = NAMES if totals[:, 2].all() else NAMES[:2]
    return [[dict(zip(names, layer, strict=False)) for layer in layers] for layers in figures.tolist()]


def chunks_of(text: torch.Tensor, size: int) -> torch.Tensor:
    """Return positions (C, size) of consecutive tokens of one text; what is left over at a text's end is left out.

    Args:
        text: (T,), the number of the text each token is of, not decreasing.
    """
    _, lengths = text.unique_consecutive(return_counts=True)
    starts = lengths.cumsum(0) - lengths
    place = torch.arange(len(text), device=text.device) - starts.repeat_interleave(lengths)  # within its text
    whole = (lengths - lengths % size).repeat_interleave(lengths)
    return (place < whole).nonzero()[:, 0].view(-1, size)
