"""Blocks of how long things take, from the committed files of model_cards/ and of the benchmarks."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from documents import read, table

ROOT = Path(__file__).parent.parent
SPEED = ROOT / "model_cards" / "speed"
BENCHMARKS = ROOT / "kernels" / "moefy_ffn" / "benchmarks"
TOKENS = (1, 2, 4, 8, 128, 512, 2048)  # per call: the columns of the table of speeds


def one_token(preset: str) -> float:
    """Return how many times as fast as `F.linear` the kernel computes a token."""
    rows = read(BENCHMARKS / f"{preset}.json")["rows"]
    return next(row["ratio"] for row in rows if (row["implementation"], row["tokens"]) == ("cpu", 1))


def generation(preset: str) -> float:
    rows = read(SPEED / f"{preset}_generate.json")["rows"]
    return next(row["ratio"] for row in rows if row["implementation"] == "cpu")


def measured(name: str) -> list[dict[str, str]]:
    with open(SPEED / f"{name}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def speed_ffns() -> str:
    """Every benchmark of FFNs: a line each."""
    rows = []
    for path in sorted(BENCHMARKS.glob("*.json"), key=lambda path: (("_" in path.stem), path.stem)):
        found = read(path)
        cells = {row["tokens"]: row for row in found["rows"] if row["implementation"] == "cpu"}
        shown = {n: f"{cells[n]['ratio']:.1f} ({cells[n]['ratio_best_dense']:.1f})" for n in TOKENS if n in cells}
        rows.append({"FFN": described(found["settings"]), **{str(n): shown.get(n, "") for n in TOKENS}})
    return table(rows)


def described(settings: Mapping[str, Any]) -> str:
    """Return a benchmark's settings, those left out that are the usual ones."""
    threads = settings["threads"]
    parts = [settings["preset"], f"{threads} thread{'s' if threads > 1 else ''}"]
    parts += ["bfloat16"] if settings["dtype"] == "bfloat16" else []
    parts += [f"experts of {settings['expert_size']}"] if settings["expert_size"] != 32 else []
    parts += ["low-rank router"] if settings["router"] == "LowRankRouter" else []
    parts += [f"{settings['share']:.0%} of the experts"] if settings["share"] != 0.2 else []
    parts += [f"{settings['nonzero']:.0%} non-zero"] if settings.get("nonzero") else []
    return ", ".join(parts)


def speed_models() -> str:
    """Every measurement of whole models."""
    titles = {"minilm_batch_1": "MiniLM, one review", "minilm_batch_32": "MiniLM, 32 reviews"}
    titles |= {"smollm2_generate": "SmolLM2-135M, generating"}
    rows = [
        (titles[name], row["implementation"], float(row["share"]), float(row["times_dense"]))
        for name in titles
        for row in measured(name)
        if row["implementation"] != "dense"
    ]
    rows += [
        (f"{preset}, random weights, generating", "cpu", 0.2, generation(preset)) for preset in ("t5-base", "opt-1.3b")
    ]
    return table(
        {"model": model, "implementation": how, "experts computed": f"{share:.0%}", "times dense": f"{ratio:.2f}"}
        for model, how, share, ratio in rows
    )


AGAINST = {
    "minilm": "MiniLM, movie reviews",
    "r52": "MiniLM, Reuters R52",
    "t5": "T5 of width 128, Reuters R8",
    "vit": "ViT of width 128, Fashion-MNIST",
    "smollm2": "SmolLM2-135M, prose",
}
WORK = {  # column -> (work, texts at once)
    "one text": ("forward", 1),
    "32 texts": ("forward", 32),
    "a prompt": ("prompt", 1),
    "writing": ("generate", 1),
}


def against(*words: str) -> str:
    """Dense and MoEfied models in every engine: a line each, in its cells the two models; nothing without files.

    Args:
        words: the models, all by default, and the suffix of their files, if any.
    """
    lines = []
    suffix = next((word for word in words if word.startswith("_")), "")
    models = [word for word in words if word != suffix] or [*AGAINST]
    for name, title in ((name, AGAINST[name]) for name in models):
        path = SPEED / f"against_{name}{suffix}.json"
        if not path.exists():
            continue
        found = read(path)
        rows = {(row["engine"], row["model"], row["work"], row["batch"]): row for row in found["rows"]}
        for engine in found["versions"]:
            cells: dict[str, str] = {}
            for column, work in WORK.items():
                pair = [rows.get((engine, model, *work)) for model in ("dense", "MoEfied")]
                cells[column] = ", ".join(f"{row['ratio']:.2f}" for row in pair if row)
            qualities = {row["model"]: f"{row['quality']:.4g}" for row in found["rows"] if row["engine"] == engine}
            cells["quality"] = f"{found['settings']['quality']} {', '.join(qualities.values())}"
            experts = f"{found['settings']['experts']:.0%}"
            lines.append({"model": title, "experts computed": experts, "engine": engine, **cells})
    used = [name for name in (lines[0] if lines else ()) if any(line[name] for line in lines)]
    return table([{name: line[name] for name in used} for line in lines]) if lines else ""


def training_step() -> str:
    """What a fine-tuning step costs, relative to a dense one."""
    return table(
        {
            "batch": f"{row['batch']} texts of {row['length']} tokens",
            "routed": f"{float(row['routed']):.2f}",
            "routed, with figures logged": f"{float(row['watched']):.2f}",
        }
        for row in measured("training_step")
    )


def costs() -> str:
    """How long three jobs take."""
    quick, conversion, recipe = (read(ROOT / "model_cards" / f"{name}.json") for name in COSTS)
    minutes = quick["seconds"]["setup"] + quick["seconds"]["recipe"], conversion["seconds"]["all"], recipe["seconds"]
    return table(
        {
            "job": job,
            "minutes": f"{seconds / 60:.0f}",
            "peak memory": f"{found['peak_gigabytes']} GB" if "peak_gigabytes" in found else "",
            "hardware": found["hardware"],
        }
        for job, seconds, found in zip(COSTS.values(), minutes, (quick, conversion, recipe), strict=True)
    )


COSTS = {
    "quickstart": "quickstart recipe, MiniLM on movie reviews",
    "conversion": "`moefy convert`, SmolLM2-135M",
    "prose_recipe": "`moefy_causal_lm.py`, SmolLM2-135M",
}


def split_times() -> str:
    """How long the largest matrices of the splitters' benchmarks take."""
    folder = ROOT / "moefy_hf" / "splitters" / "benchmarks"
    with open(folder / "balanced_kmeans.csv", newline="", encoding="utf-8") as file:
        clusters = [row for row in csv.DictReader(file) if row["method"].startswith("ours") and int(row["n"]) >= 3072]
    with open(folder / "coactivation.csv", newline="", encoding="utf-8") as file:
        graphs = list(csv.DictReader(file))
    largest = {(int(row["n"]), int(row["d"]), int(row["clusters"])): row for row in clusters}
    rows = [("clustering", f"{n:,} x {d:,}", e, float(row["seconds"])) for (n, d, e), row in sorted(largest.items())]
    for row in graphs:
        seconds = float(row["graph_seconds"]) + float(row["seconds"])
        rows.append(
            ("co-activation", f"{int(row['neurons']):,}, {int(row['tokens']):,} tokens", row["experts"], seconds)
        )
    return table(
        {"split": split, "neurons": size, "experts": str(experts), "seconds": f"{seconds:.0f}"}
        for split, size, experts, seconds in rows
    )


def gguf_same() -> str:
    """Whether files for llama.cpp are the models that they were made of."""
    return table(
        {
            "experts": f"{each['k']:.0%} of {each['model'].rpartition('-')[2]} neurons each",
            "largest difference / largest logit": f"{each['largest_difference']:.1e}",
            "tokens that ran another expert": f"{each['tokens_that_differ']} of {each['tokens']}",
            "identical generations": f"{each['identical_generations']} of {each['generations']}",
        }
        for each in read(SPEED / "gguf_smollm2.json")["same"]
    )


def gguf_speed() -> str:
    """Tokens a second in llama.cpp, and the perplexity that goes with them: a line for each type and model."""
    lines: dict[tuple[str, str, float], dict[str, str]] = {}
    for row in read(SPEED / "gguf_smollm2.json")["rows"]:
        key = row["type"], row["model"], row["k"]
        what = "dense" if row["model"] == "dense" else f"{row['k']:.0%}, of {row['model'].rpartition('-')[2]} neurons"
        line = lines.setdefault(key, {"type": row["type"], "experts": what})
        work = {"prompt": "prompt", "generate": "new tokens"}[row["work"]]
        threads = f"{row['threads']} thread{'s' if row['threads'] > 1 else ''}"
        line[f"{work}, {threads}"] = f"{row['tokens_per_second']:.0f} ({row['ratio']:.2f})"
        line["perplexity"] = f"{row['perplexity']:.1f}"
    return table([{**line, "perplexity": line.pop("perplexity")} for line in lines.values()])


def plans() -> str:
    """Every committed plan: what was asked for, and what was found of each candidate."""
    rows = []
    for path in sorted(SPEED.glob("plan_*.json")):
        found = read(path)["plan"]
        goal, load = found["goal"], found["load"]
        threads = f"{load['threads']} thread{'s' * (load['threads'] > 1)}"
        asked = f"{found['measure']} of dense {goal['quality']:g}, batch {load['batch']}, {threads}"
        for row in found["rows"]:
            quality, speed = row["quality"], row["speed"]
            rows.append(
                {
                    "model": path.stem.removeprefix("plan_"),
                    "asked for": asked,
                    "candidate": row["candidate"],
                    "computed": f"{row['experts']:.0%}",
                    "quality of dense": f"{quality['value']:.4f} ± {3 * quality['error']:.4f}",
                    "times dense": f"{speed['ratio']:.2f}",
                    "": "chosen" if row["candidate"] == found["chosen"] else "reached" if row["reached"] else "",
                }
            )
    return table(rows)


BLOCKS = {
    function.__name__: function
    for function in (
        against,
        gguf_same,
        gguf_speed,
        speed_ffns,
        speed_models,
        training_step,
        costs,
        plans,
        split_times,
    )
}
