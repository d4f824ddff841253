"""Time and inertia of our balanced k-means against k-means-constrained (where installed), run in turns; medians.

    python -m moefy_hf.splitters.benchmarks.balanced_kmeans --shapes 3072x768x96 4096x1024x128 --csv kmeans.csv
    python -m moefy_hf.splitters.benchmarks.balanced_kmeans --safetensors model.safetensors \
        --pattern "intermediate.dense.weight" --expert_size 32

Rows are L2-normalised, as the splitter's are: Gaussian ones of the given shapes, or those of a checkpoint's matrices.
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from safetensors import safe_open

from moefy_hf.splitters.balanced_kmeans import balanced_kmeans, inertia

from ...io import write_csv

COLUMNS = (
    "points",
    "n",
    "d",
    "clusters",
    "method",
    "seed",
    "seconds",
    "cpu_seconds",
    "inertia",
    "peak_rss_mb",
    "threads",
)
Method = Callable[[torch.Tensor, int, int], torch.Tensor]  # points (n, d), clusters, seed -> labels (n,)


def ours(starts: int) -> Method:
    """Return our search from so many starts."""
    return lambda points, k, seed: balanced_kmeans(points, k, torch.Generator().manual_seed(seed), starts=starts)


def random_split(points: torch.Tensor, k: int, seed: int) -> torch.Tensor:
    """Return labels (n,) of points (n, d) that are drawn at random, in k equal parts."""
    return torch.randperm(len(points), generator=torch.Generator().manual_seed(seed)) % k


def methods(starts: list[int]) -> dict[str, Method]:
    """Return what is compared, by name."""
    table: dict[str, Method] = {"random": random_split} | {f"ours, starts={count}": ours(count) for count in starts}
    try:
        from k_means_constrained import KMeansConstrained
    except ImportError:
        print("k-means-constrained is not installed: nothing to compare with", file=sys.stderr)
        return table

    def theirs(points: torch.Tensor, k: int, seed: int) -> torch.Tensor:
        m = len(points) // k
        model = KMeansConstrained(k, size_min=m, size_max=m, n_init=1, random_state=seed)
        return torch.from_numpy(model.fit_predict(points.numpy())).long()

    return table | {"k-means-constrained": theirs}


def point_sets(args: argparse.Namespace) -> Iterator[tuple[str, torch.Tensor, int]]:
    """Yield (name, unit rows (n, d), clusters)."""
    for shape in args.shapes:
        n, d, k = map(int, shape.split("x"))
        yield (
            f"gaussian {shape}",
            F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(0)), dim=-1),
            k,
        )
    if args.safetensors:
        with safe_open(args.safetensors, framework="pt") as file:
            for name in sorted(key for key in file.keys() if key.endswith(args.pattern)):
                rows = F.normalize(file.get_tensor(name).float(), dim=-1)
                yield name, rows, len(rows) // args.expert_size


def main() -> None:
    """Compare methods as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=["3072x768x96", "4096x1024x128"], help="n x d x clusters")
    parser.add_argument("--safetensors", help="checkpoint to take real rows from")
    parser.add_argument("--pattern", default="intermediate.dense.weight", help="how the names of its matrices end")
    parser.add_argument("--expert_size", type=int, default=32, help="rows per cluster of the checkpoint's matrices")
    parser.add_argument("--starts", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3, help="seeds per method, in turns")
    parser.add_argument("--skip", nargs="*", default=[], help="methods to leave out")
    parser.add_argument("--csv", help="file to write all runs to")
    args = parser.parse_args()

    runs = []
    print(f"cpu, float32, {torch.get_num_threads()} threads")
    for name, points, k in point_sets(args):
        table = {method: run for method, run in methods(args.starts).items() if method not in args.skip}
        results: dict[str, list[tuple[float, float, float]]] = {method: [] for method in table}
        for seed in range(args.repeats):
            for method, run in table.items():
                wall, cpu = time.perf_counter(), time.process_time()
                labels = run(points, k, seed)
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                if torch.bincount(labels, minlength=k).tolist() != [len(points) // k] * k:
                    raise RuntimeError(f"{method}: clusters are not equally large")
                results[method].append((wall, cpu, inertia(points, labels)))
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
                numbers = (f"{wall:.3f}", f"{cpu:.3f}", f"{results[method][-1][2]:.4f}", peak)
                runs.append((name, *points.shape, k, method, seed, *numbers, torch.get_num_threads()))
        print(f"{name}: {len(points)} x {points.shape[1]} into {k}")
        middle = {
            method: [sorted(run[i] for run in measured)[len(measured) // 2] for i in range(3)]
            for method, measured in results.items()
        }
        for method, (wall, cpu, loss) in middle.items():
            line = f"  {method:20} {wall:8.2f} s ({cpu:.2f} s cpu)   inertia {loss:.2f}"
            if "k-means-constrained" in middle:
                reference = middle["k-means-constrained"]
                line += f"   x{wall / reference[0]:.2f} the time, x{loss / reference[2]:.4f} the inertia"
            print(line, flush=True)
    if args.csv:
        write_csv(args.csv, COLUMNS, runs)


if __name__ == "__main__":
    main()
