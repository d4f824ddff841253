"""The co-activation graph: its weights, and its partition into parts of exactly equal size."""

from collections.abc import Iterable

import torch
from transformers.utils import logging

from ..errors import MoefyError
from ..measure.profile import SiteProfile
from ..measure.sample import FfnSample
from .equal_parts import blocks, labels_of, multilevel_parts, swap_rows, weight_inside

logger = logging.get_logger("moefy_hf")

METHODS = ("multilevel", "metis")
KINDS = ("product", "count")

# METIS adds up edge weights in 32 bits in some builds
_METIS_TOTAL = 2**30


def sample_of(profile: SiteProfile | None, splitter: str) -> FfnSample:
    """Return the sample of FFN inputs that a splitter learns from.

    Raises:
        MoefyError: there is no profile, or it kept no sample.
    """
    if profile is None:
        raise MoefyError(f'the splitter "{splitter}" needs calibration data')
    return profile.sample


def coactivation_matrix(
    neuron_chunks: Iterable[torch.Tensor], num_neurons: int, kind: str = "product"
) -> torch.Tensor:
    """Return (f, f), how strongly two neurons fire together, with a zero diagonal.

    The edge weights of MoEfication (section 3.2): sum over tokens of relu(h_n) * relu(h_m), so only tokens at which
    both are positive count. Accumulated in float32 on the device of the chunks.

    Args:
        neuron_chunks: activations (T, f).
        kind: "product" as above; "count" for the number of those tokens, which the reference code approximates.

    Raises:
        MoefyError: unknown kind, a chunk that is not (T, f), or no chunk.
    """
    if kind not in KINDS:
        raise MoefyError(f"unknown kind {kind!r}; choose from {', '.join(KINDS)}")
    total = None
    for chunk in neuron_chunks:
        if chunk.dim() != 2 or chunk.shape[1] != num_neurons:
            raise MoefyError(f"expected chunks of shape (T, {num_neurons}), got {tuple(chunk.shape)}")
        fired = chunk.detach().float().relu() if kind == "product" else (chunk > 0).float()  # (T, f)
        if total is None:
            total = fired.new_zeros(num_neurons, num_neurons)
        total.addmm_(fired.T, fired)
    if total is None:
        raise MoefyError("no activations to compute a co-activation matrix from")
    return total.fill_diagonal_(0)


def partition_graph(
    weights: torch.Tensor,
    num_parts: int,
    generator: torch.Generator,
    method: str | None = None,
    edges_per_neuron: int = 128,
    max_sweeps: int = 10,
    warm: bool = False,
) -> torch.Tensor:
    """Return labels (f,) of `num_parts` parts of exactly equal size with much weight inside them (MoEfication, section
    3.2).

    Either method ends in swaps of two neurons that raise the weight inside (`equal_parts.swap_rows`), which decide the
    quality: on co-activations of MiniLM METIS and repair alone are 1 to 10 % below.

    Args:
        weights: (f, f), symmetric and non-negative.
        generator: on any device; the same seed gives the same labels.
        method: "multilevel", the default, needs nothing but torch; "metis" is the paper's, through pymetis, its parts
            then repaired to equal sizes. Without pymetis, "metis" warns and becomes "multilevel".
        edges_per_neuron: METIS sees only this many of a neuron's strongest edges. Swaps always see all.
        max_sweeps: most sweeps of swaps over all pairs of parts.
        warm: search from the blocks of f / num_parts neurons that follow each other, too, and keep the better.

    Raises:
        MoefyError: f is not a multiple of num_parts, weights that are not symmetric, finite and non-negative, or an
            unknown method.
    """
    _check_graph(weights, num_parts)
    if method not in (None, *METHODS):
        raise MoefyError(f"unknown method {method!r}; choose from {', '.join(METHODS)}")
    weights = weights.detach().to(torch.promote_types(weights.dtype, torch.float32))
    if method == "metis" and _metis_available():
        labels = metis_partition(weights, num_parts, generator, edges_per_neuron)
        members = repair_sizes(weights, labels, num_parts).argsort(stable=True).view(num_parts, -1)
        searched = [swap_rows(weights, members, generator, max_sweeps)]
    else:
        searched = [multilevel_parts(weights, num_parts, generator, max_sweeps)]
    if warm:
        searched.append(swap_rows(weights, blocks(len(weights), num_parts, weights.device), generator, max_sweeps))
    return labels_of(max(searched, key=lambda members: weight_inside(weights, members)))


def _check_graph(weights: torch.Tensor, num_parts: int) -> None:
    if weights.dim() != 2 or weights.shape[0] != weights.shape[1] or not weights.is_floating_point():
        raise MoefyError(f"expected a square floating-point matrix, got {weights.dtype} {tuple(weights.shape)}")
    f = len(weights)
    if num_parts < 1 or f == 0 or f % num_parts:
        raise MoefyError(f"{f} neurons cannot be put into {num_parts} parts of equal size")
    low, high = weights.aminmax()
    if not (low >= 0 and high < torch.inf):
        raise MoefyError("edge weights must be finite and non-negative")
    for start in range(0, f, 1024):
        rows, columns = weights[start : start + 1024], weights[:, start : start + 1024]
        if not torch.allclose(rows, columns.T, rtol=1e-3, atol=float(high) * 1e-6):
            raise MoefyError("edge weights must be symmetric")


def _metis_available() -> bool:
    try:
        import pymetis  # noqa: F401
    except ImportError as error:
        logger.warning_once(
            f"METIS is not available ({error}; pip install pymetis): partitioning with 'multilevel' instead, which "
            "leaves about as much weight inside the parts."
        )
        return False
    return True


def strongest_edges(weights: torch.Tensor, edges_per_neuron: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the positive edges of weights (f, f) that are among the strongest of either end, both ways: rows (nnz,),
    columns (nnz,) and values (nnz,) in CSR order."""
    f = len(weights)
    keep = min(edges_per_neuron, f)
    keys = []
    for start in range(0, f, 1024):
        block = weights[start : start + 1024]
        value, column = block.topk(keep, dim=1)
        row = torch.arange(start, start + len(block), device=weights.device)[:, None].expand_as(column)
        edge = (value > 0) & (row != column)
        row, column = row[edge], column[edge]
        keys += [row * f + column, column * f + row]
    edges = torch.cat(keys).unique()
    rows, columns = edges // f, edges % f
    return rows, columns, torch.maximum(weights[rows, columns], weights[columns, rows])


def metis_partition(
    weights: torch.Tensor, num_parts: int, generator: torch.Generator, edges_per_neuron: int = 128
) -> torch.Tensor:
    """Return labels (f,) of parts of nearly equal size: METIS's recursive bisection of the strongest edges of weights
    (f, f), symmetric.

    As in the reference code, weights become integers by division by their first percentile, and those below 1 go.

    Raises:
        ImportError: pymetis is not installed.
    """
    import pymetis

    f = len(weights)
    rows, columns, values = strongest_edges(weights, edges_per_neuron)
    if len(values):
        values = values.double() / values.kthvalue(1 + len(values) // 100).values
        values = (values * min(1.0, _METIS_TOTAL / values.sum().item())).floor()
    heavy = values >= 1
    rows, columns, values = rows[heavy].cpu(), columns[heavy].cpu(), values[heavy].long().cpu()
    starts = torch.cat([torch.zeros(1, dtype=torch.long), torch.bincount(rows, minlength=f).cumsum(0)])
    seed = int(torch.randint(2**31 - 1, (1,), generator=generator, device=generator.device))
    _, labels = pymetis.part_graph(
        num_parts,
        pymetis.CSRAdjacency(starts.numpy(), columns.numpy()),
        eweights=values.numpy(),
        recursive=True,
        options=pymetis.Options(seed=seed),
    )
    return torch.tensor(labels, dtype=torch.long, device=weights.device)


def repair_sizes(weights: torch.Tensor, labels: torch.Tensor, num_parts: int) -> torch.Tensor:
    """Return labels (f,) of equally large parts.

    Surplus neurons move one by one, always the one whose move to a part with room loses the least edge weight.

    Args:
        weights: (f, f), symmetric.
        labels: (f,) of parts of any sizes, not modified.
    """
    labels = labels.clone()
    target = len(labels) // num_parts
    sizes = torch.bincount(labels, minlength=num_parts)
    order = labels.argsort(stable=True)
    offsets = sizes.cumsum(0) - sizes
    reach = torch.nn.functional.embedding_bag(order, weights, offsets, mode="sum")  # (k, f)
    while (sizes > target).any():
        surplus = (sizes[labels] > target).nonzero()[:, 0]  # (s,)
        room = (sizes < target).nonzero()[:, 0]  # (r,)
        stay = reach[labels[surplus], surplus] - weights.diagonal()[surplus]
        gain = reach[room][:, surplus] - stay  # (r, s)
        best = int(gain.argmax())
        to, neuron = room[best // len(surplus)], surplus[best % len(surplus)]
        home = labels[neuron].clone()
        reach[home] -= weights[neuron]
        reach[to] += weights[neuron]
        sizes[home] -= 1
        sizes[to] += 1
        labels[neuron] = to
    return labels
