"""Equal parts of a symmetric matrix with as much weight inside them as can be found.

Balanced k-means and the co-activation graph are this one problem. With n/k points per cluster the inertia is
sum |x|^2 - (k/n) * (the Gram matrix summed over all pairs that share a cluster), so the fewer inertia, the more weight
inside. Lloyd's iterations, balanced or not, hardly move in hundreds of dimensions: a centre of 32 points is largely
its own members. Swapping two points of different parts has an exact gain instead, and keeps all sizes as they are.

Symbols: n rows, k parts of m = n/k rows each. `members` (k, m) lists the rows of each part.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

# a gain below this share of the sums whose difference it is may be rounding
_ROUNDING = 2e-6


def labels_of(members: torch.Tensor) -> torch.Tensor:
    """Return the part (n,) of each row; members (k, m)."""
    k, m = members.shape
    labels = torch.empty(k * m, dtype=torch.long, device=members.device)
    labels[members.flatten()] = torch.arange(k, device=members.device).repeat_interleave(m)
    return labels


def blocks(n: int, num_parts: int, device: torch.device) -> torch.Tensor:
    """Return parts (k, m) of rows that follow each other."""
    return torch.arange(n, device=device).view(num_parts, -1)


def part_sums(weights: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
    """Return (p, n), the sum of each part's rows of weights (n, n), without a copy of them; members (p, q)."""
    return F.embedding_bag(members, weights, mode="sum")


def weight_inside(weights: torch.Tensor, members: torch.Tensor) -> float:
    """Return the sum of `weights` (n, n) over ordered pairs, each row with itself included, that share a part of
    `members` (k, m)."""
    return part_sums(weights, members).gather(1, members).double().sum().item()


def grow_parts(weights: torch.Tensor, num_parts: int, generator: torch.Generator) -> torch.Tensor:
    """Return parts (k, m) that are grown one after the other; weights (n, n), symmetric.

    Each starts at a random free row and takes, again and again, the free row nearest to it. Nearest means smallest
    w_jj - 2 * mean_{i in part} w_ij: for a Gram matrix the distance to the part's mean, for a graph without loops the
    strongest tie.
    """
    n = len(weights)
    members = torch.empty(num_parts, n // num_parts, dtype=torch.long, device=weights.device)
    turn = torch.randperm(n, generator=generator, device=generator.device).to(weights.device)
    closeness = -weights.diagonal()  # (n,), a new tensor; -inf for rows that are taken
    for part in members:
        free = turn[closeness[turn] > -torch.inf]
        row = free[0]
        tie = torch.zeros_like(closeness)  # (n,) weight to the part so far
        for size in range(len(part)):
            if size:
                row = torch.add(closeness, tie, alpha=2 / size).argmax()
            part[size] = row
            closeness[row] = -torch.inf
            tie += weights[row]
    return members


def _rounds(k: int, generator: torch.Generator) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield all pairs of k parts once, in rounds (p,), (p,) of disjoint pairs, in random order: a round-robin
    tournament."""
    players = torch.randperm(k, generator=generator, device=generator.device).cpu()
    teams = k + k % 2  # an odd one out pauses
    players = F.pad(players, (0, teams - k), value=-1)
    i = torch.arange(1, teams // 2)
    for r in range(teams - 1):
        a = players[1 + torch.cat([torch.tensor([r]), r + i]) % (teams - 1)]
        b = torch.cat([players[:1], players[1 + (r - i) % (teams - 1)]])
        both = (a >= 0) & (b >= 0)
        yield a[both], b[both]


def swap_rows(
    weights: torch.Tensor,
    members: torch.Tensor,
    generator: torch.Generator,
    max_sweeps: int = 10,
    swaps_per_pair: int = 8,
    candidates: int = 4,
) -> torch.Tensor:
    """Swap pairs of rows between parts for as long as that raises the weight inside: a local search.

    A sweep meets all pairs of parts once, k/2 disjoint pairs at a time: their swaps do not touch each other's gains,
    so every gain is exact. Within a pair the `candidates` rows of either side that gain most from leaving are tried
    against each other. Stops after a sweep without a swap.

    Args:
        weights: (n, n) symmetric; the diagonal plays no role in the gains.
        members: (k, m), not modified.
        swaps_per_pair: most swaps between two parts when they meet.

    Returns:
        parts (k, m) with at least as much weight inside.
    """
    members = members.clone()
    k, m = members.shape
    c = min(candidates, m)

    def leaving(rows: torch.Tensor, own: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """rows (p, m) of parts `own` -> gains (p, c) and positions (p, c) of those that most want to go to `other`."""
        return (reach[other[:, None], rows] - reach[own[:, None], rows] + extra[rows]).topk(c, dim=1)

    for _ in range(max_sweeps):
        reach = part_sums(weights, members)  # (k, n): weight between each part and each row
        # a row's tie to itself is not lost when it leaves; gains that may be rounding do not count
        extra = weights.diagonal() - _ROUNDING * torch.linalg.vector_norm(reach, ord=torch.inf, dim=0)  # (n,)
        swapped = False
        for a, b in _rounds(k, generator):
            a, b = a.to(weights.device), b.to(weights.device)
            for _ in range(swaps_per_pair):
                rows_a, rows_b = members[a], members[b]  # (p, m)
                gain_a, at_a = leaving(rows_a, a, b)
                gain_b, at_b = leaving(rows_b, b, a)
                i, j = rows_a.gather(1, at_a), rows_b.gather(1, at_b)  # (p, c)
                # the edge between the two stays cut, though both gains count it as won
                gain = gain_a[:, :, None] + gain_b[:, None, :] - 2 * weights[i[:, :, None], j[:, None, :]]
                gain, best = gain.flatten(1).max(dim=1)
                won = (gain > 0).nonzero()[:, 0]
                if len(won) == 0:
                    break
                swapped = True
                a, b, first, second = a[won], b[won], best[won] // c, best[won] % c
                i, j = i[won, first], j[won, second]
                members[a, at_a[won, first]], members[b, at_b[won, second]] = j, i
                moved = weights[j] - weights[i]  # (p, n)
                reach.index_add_(0, a, moved)
                reach.index_add_(0, b, moved, alpha=-1)
        if not swapped:
            break
    return members


def coarsen(weights: torch.Tensor, groups: torch.Tensor, chunk: int = 1024) -> torch.Tensor:
    """Return the weight (g, g) between groups (g, s) of rows, on its diagonal that inside them; weights (n, n)."""
    coarse = weights.new_empty(len(groups), len(groups))
    for start in range(0, len(groups), chunk):
        rows = part_sums(weights, groups[start : start + chunk])  # (chunk, n)
        coarse[start : start + chunk] = rows[:, groups].sum(-1)
    return coarse


def multilevel_parts(
    weights: torch.Tensor, num_parts: int, generator: torch.Generator, max_sweeps: int = 10, levels: int = 2
) -> torch.Tensor:
    """Return parts (k, m): solve the problem for tied couples of rows first, then for single rows.

    Moving couples escapes optima where two strong neighbours hold each other in the wrong part, which heavy-tailed
    graphs have many of. This is METIS's scheme (Karypis and Kumar, 1998) with sizes kept equal throughout.

    Args:
        weights: (n, n), symmetric.
        levels: how often rows are coupled; fewer if m is not divisible by two as often.
    """
    n = len(weights)
    if levels == 0 or (n // num_parts) % 2 or num_parts == n:
        members = grow_parts(weights, num_parts, generator)
    else:
        couples = grow_parts(weights, n // 2, generator)  # (n/2, 2)
        coarse = coarsen(weights, couples)
        # three sweeps are enough where the level below goes on
        above = multilevel_parts(coarse, num_parts, generator, min(max_sweeps, 3), levels - 1)
        del coarse
        members = couples[above].flatten(1)
    return swap_rows(weights, members, generator, max_sweeps)
