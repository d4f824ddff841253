"""Time and memory of the co-activation split: the graph from activations, and its partition.

    python -m moefy_hf.splitters.benchmarks.coactivation --shapes 3072x96 16384x512 --csv coactivation.csv

Activations are made up: every token fires the neurons of some planted groups, and some at random. The weight inside
the parts is given relative to that inside the planted groups; a random split has 1 / experts of all weight.
"""

import argparse
import resource
import time
from collections.abc import Iterator

import torch

from moefy_hf.splitters.equal_parts import labels_of, weight_inside
from moefy_hf.splitters.graph import METHODS, coactivation_matrix, partition_graph

from ...io import write_csv

COLUMNS = (
    "neurons",
    "experts",
    "tokens",
    "method",
    "graph_seconds",
    "seconds",
    "cpu_seconds",
    "inside",
    "peak_rss_mb",
)


def activations(
    neurons: int, experts: int, tokens: int, chunk: int = 1024, seed: int = 0
) -> tuple[Iterator[torch.Tensor], torch.Tensor]:
    """Return made-up activations in chunks (t, f), and the planted group of each neuron (f,)."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randperm(neurons, generator=generator) % experts

    def chunks() -> Iterator[torch.Tensor]:
        for _ in range(0, tokens, chunk):
            on = torch.rand(chunk, experts, generator=generator) < 0.05
            fires = torch.rand(chunk, neurons, generator=generator)
            yield fires * (on[:, groups] & (fires > 0.4) | (fires > 0.97))

    return chunks(), groups


def main() -> None:
    """Time the split as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=["3072x96", "16384x512"], help="neurons x experts")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--methods", nargs="*", default=["multilevel"], choices=METHODS)
    parser.add_argument("--csv", help="file to write all runs to")
    args = parser.parse_args()

    runs = []
    print(f"cpu, float32, {torch.get_num_threads()} threads")
    for shape in args.shapes:
        neurons, experts = map(int, shape.split("x"))
        chunks, groups = activations(neurons, experts, args.tokens)
        started = time.perf_counter()
        graph = coactivation_matrix(chunks, neurons)
        built = time.perf_counter() - started
        planted = weight_inside(graph, groups.argsort(stable=True).view(experts, -1))
        for method in args.methods:
            wall, cpu = time.perf_counter(), time.process_time()
            labels = partition_graph(graph, experts, torch.Generator().manual_seed(0), method)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            members = labels.argsort(stable=True).view(experts, -1)
            if not torch.equal(labels_of(members), labels):
                raise RuntimeError(f"{method}: parts are not equally large")
            inside = weight_inside(graph, members) / planted
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            figures = (f"{figure:.3f}" for figure in (built, wall, cpu, inside))
            runs.append((neurons, experts, args.tokens, method, *figures, peak))
            print(
                f"{neurons} into {experts}, {method}: graph of {args.tokens} tokens {built:.1f} s, partition "
                f"{wall:.1f} s ({cpu:.1f} s cpu), weight inside {inside:.3f} of planted, peak {peak} MB",
                flush=True,
            )
        del graph
    if args.csv:
        write_csv(args.csv, COLUMNS, runs)


if __name__ == "__main__":
    main()
