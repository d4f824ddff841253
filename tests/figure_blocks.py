"""Blocks of figures, from the committed files under model_cards/ and kernels/moefy_ffn/benchmarks/."""

import csv
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "recipes"))
import prose_facts  # noqa: E402
import sweep_tables  # noqa: E402

FACTS = ROOT / "model_cards" / "facts"
SPEED = ROOT / "model_cards" / "speed"
BENCHMARKS = ROOT / "kernels" / "moefy_ffn" / "benchmarks"

# facts of a classifier at one budget: the row's title, and the budget
CLASSIFIERS = {
    "minilm_movie_recovery": ("MiniLM with ReLU, movie reviews", 0.2),
    "minilm_r52_recovery": ("MiniLM with ReLU, Reuters R52", 0.2),
    "vit_fashion_recovery": ("ViT, Fashion-MNIST", 0.2),
    "t5_r8_recovery": ("T5, Reuters R8", 0.2),
    "minilm_movie_gelu": ("MiniLM with GELU, movie reviews", 0.3),
}
TOKENS = (1, 2, 4, 8, 128, 512, 2048)  # per call: the columns of the table of speeds
SHARED = "profile over {} that neurons of an expert share"


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def facts(name: str) -> dict[str, Any]:
    return read(FACTS / f"{name}.json")


def table(rows: Iterable[Mapping[str, str]]) -> str:
    """Return rows with the same keys as a Markdown table."""
    rows = list(rows)
    lines = [rows[0].keys(), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def times(ratio: float, digits: int = 1) -> str:
    return f"{ratio:.{digits}f}x"


# ---- what a model keeps


def kept(name: str) -> tuple[float, float, float]:
    """Return (share of the FFNs' FLOPs, accuracy relative to dense once converted, the same once fine-tuned)."""
    share = CLASSIFIERS[name][1]
    rows = [row for row in facts(name)["rows"] if (row["share"], row["allocation"]) == (share, "sensitivity")]
    at = {row["router"]: row for row in rows}
    return at["linear"]["ffn_flops"], *(at[key]["relative_quality"] for key in ("linear", "linear, recovered"))


def language_model(k: float) -> tuple[float, float, float]:
    """Return what `kept` does of SmolLM2 at the share k of its neurons: perplexity relative to dense."""
    rows = [row for row in facts("smollm2_recovery")["perplexities"] if (row["type"], row["k"]) == ("level", k)]
    at = {"recovery" in row["method"]: row for row in rows}
    cost = max(row["ffn_flops"] for row in rows)  # of a threshold, which does not spend the same before and after
    return cost, at[False]["relative_quality"], at[True]["relative_quality"]


def results() -> str:
    """Quality relative to dense, of six conversions."""
    rows = []
    for name, (title, _) in CLASSIFIERS.items():
        cost, converted, tuned = kept(name)
        rows.append((title, "accuracy", f"{cost:.0%}", f"{converted:.1%}", f"{tuned:.1%}"))
    cost, converted, tuned = language_model(0.32)
    rows.append(("SmolLM2-135M, prose", "perplexity", f"{cost:.0%}", times(converted, 2), times(tuned, 2)))
    titles = ("model", "measure", "FFN compute", "converted", "fine-tuned")
    return table(dict(zip(titles, row, strict=True)) for row in rows)


def sweep(name: str) -> str:
    """The tables of a sweep of classifiers."""
    return sweep_tables.tables(facts(name), ["relative_quality"])


def prose(name: str) -> str:
    """The tables of runs of language models."""
    return prose_facts.tables(facts(name))


def command(name: str) -> str:
    """What made the figures of a facts file."""
    found = facts(name)
    lines = [found["command"]] if "command" in found else found["commands"]
    return "```bash\n" + "\n".join(lines) + "\n```"


def beside_training(name: str) -> str:
    """A recovered language model beside a dense one that was trained for as many steps."""
    rows = facts(name)["perplexities"]
    (control,) = (row["relative_quality"] for row in rows if row["router"] == "control")
    recovered = [row for row in rows if row["type"] == "level" and "recovery" in row["method"]]
    return table(
        {
            "FFN compute": f"{row['ffn_flops']:.0%}",
            "perplexity, of dense as it came": f"{row['relative_quality']:.3f}",
            "perplexity, of dense trained as long": f"{row['relative_quality'] / control:.3f}",
        }
        for row in recovered
    )


# ---- experts


def specialisation(name: str) -> str:
    """What classes have to do with experts, in the model and in two controls."""
    return table(
        {
            "experts by": row["experts by"],
            "experts with a class": f"{row['experts with a class']:.0%}",
            "of their use, classes explain": f"{row['variance that classes explain']:.0%}",
            "shared profile over classes": f"{row[SHARED.format('classes')]:.0%}",
            "over shuffled classes": f"{row[SHARED.format('shuffled classes')]:.0%}",
        }
        for row in facts(name)["specialisation"]
    )


def topics(name: str) -> str:
    """The five classes whose strongest expert of the last layer is used most often, relative to all texts."""
    last = facts(name)["layers"][-1]["topics"]
    strongest = sorted(((topic, experts[0][0]) for topic, experts in last.items() if experts), key=lambda row: -row[1])
    return table({"class": topic, "its strongest expert runs": times(rise, 0)} for topic, rise in strongest[:5])


def removal(name: str) -> str:
    """Accuracy without the experts that a class needs most, and without as many random ones."""
    rows = facts(name)["removal"]["together"]
    return table(
        {key: str(cell) if key == "experts off" else f"{cell:.1%}" for key, cell in row.items()} for row in rows
    )


# ---- speed


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


def speed() -> str:
    """Six speeds relative to dense."""
    rows = [(f"{preset} FFN, one token", "20%", one_token(preset)) for preset in ("t5-base", "opt-1.3b", "llama-1b")]
    rows += [(f"{preset}, generating", "20%", generation(preset)) for preset in ("t5-base", "opt-1.3b")]
    batch = next(row for row in measured("minilm_batch_32") if row["implementation"] == "cpu")
    rows.append(("MiniLM with GELU, 32 reviews", f"{float(batch['share']):.0%}", float(batch["times_dense"])))
    return table(
        {"what": what, "experts computed": share, "times as fast as dense": f"{ratio:.2f}"}
        for what, share, ratio in rows
    )


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


# ---- what things cost, and how exact an export is


def costs() -> str:
    """How long three jobs take."""
    quick, conversion, recipe = (read(ROOT / "model_cards" / f"{name}.json") for name in COSTS)
    minutes = quick["seconds"]["setup"] + quick["seconds"]["recipe"], conversion["seconds"]["all"], recipe["seconds"]
    return table(
        {"job": job, "minutes": f"{seconds / 60:.0f}", "hardware": found["hardware"]}
        for job, seconds, found in zip(COSTS.values(), minutes, (quick, conversion, recipe), strict=True)
    )


COSTS = {
    "quickstart": "quickstart recipe, MiniLM on movie reviews",
    "conversion": "`moefy convert`, SmolLM2-135M",
    "prose_recipe": "`moefy_causal_lm.py`, SmolLM2-135M",
}


def exports() -> str:
    """How close an exported model comes to the model it was exported from."""
    rows = [(name, facts(f"smollm2_{name}")) for name in ("llama4", "mixtral")]
    return table(
        {
            "exported to": f"`{name}`",
            "largest difference of the logits": f"{found['logits']['relative_difference']:.1e}".replace("e-0", "e-"),
            "tokens compared": f"{found['logits']['tokens']:,}",
            "identical generations": f"{found['generations']['identical']} of {found['generations']['prompts']}",
        }
        for name, found in rows
    )


def headline() -> str:
    """The README's three figures."""
    cost, converted, _ = kept("minilm_movie_recovery")
    return "\n".join(
        [
            f"- **{converted:.0%} of the accuracy** with {cost:.0%} of the FFN compute (MiniLM with ReLU, no training).",
            f"- **{times(one_token('t5-base'))} faster** T5-base FFNs on one CPU thread.",
            f"- **{times(generation('opt-1.3b'))} faster** generation with a model of OPT-1.3B's shape.",
        ]
    )


BLOCKS = {
    name.__name__: name
    for name in (headline, results, sweep, prose, command, beside_training, specialisation, topics, removal)
} | {name.__name__: name for name in (speed, speed_ffns, speed_models, training_step, costs, exports)}
