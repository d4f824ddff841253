"""Blocks of figures, from the committed files under model_cards/ and kernels/moefy_ffn/benchmarks/."""

import sys
from pathlib import Path
from typing import Any

from documents import read, table, times
from speed_blocks import generation, one_token

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "recipes" / "figures"))
import prose_facts  # noqa: E402
import sweep_tables  # noqa: E402

FACTS = ROOT / "model_cards" / "facts"

# facts of a classifier at one budget: the row's title, and the budget
CLASSIFIERS = {
    "minilm_movie_recovery": ("MiniLM with ReLU, movie reviews", 0.2),
    "minilm_r52_recovery": ("MiniLM with ReLU, Reuters R52", 0.2),
    "vit_fashion_recovery": ("ViT, Fashion-MNIST", 0.2),
    "t5_r8_recovery": ("T5, Reuters R8", 0.2),
    "minilm_movie_gelu": ("MiniLM with GELU, movie reviews", 0.3),
}
SHARED = "profile over {} that neurons of an expert share"


def facts(name: str) -> dict[str, Any]:
    return read(FACTS / f"{name}.json")


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
            "of their use, classes explain": percent(row["variance that classes explain"]),
            "shared profile over classes": percent(row[SHARED.format("classes")]),
            "over shuffled classes": percent(row[SHARED.format("shuffled classes")]),
        }
        for row in facts(name)["specialisation"]
    )


def percent(share: float) -> str:
    """Return a share in whole percent, where chance may leave it a little below 0."""
    return f"{round(100 * share) + 0:d}%"


def topics(name: str) -> str:
    """The five classes whose strongest expert of the last layer is used most often, relative to all texts."""
    last = facts(name)["layers"][-1]["topics"]
    strongest = [(topic, *experts[0]) for topic, experts in last.items() if experts]  # expert, times as often
    strongest.sort(key=lambda row: -row[2])
    return table(
        {"class": topic, "its strongest expert": str(expert), "in its texts, that runs": f"{times(rise, 0)} as often"}
        for topic, expert, rise in strongest[:5]
    )


def removal(name: str) -> str:
    """Accuracy without the experts that a class needs most, and without as many random ones."""
    rows = facts(name)["removal"]["together"]
    return table(
        {key: str(cell) if key == "experts off" else f"{cell:.1%}" for key, cell in row.items()} for row in rows
    )


# ---- how exact an export is


def exports() -> str:
    """How close an exported model comes to the model it was exported from."""
    granitemoe, mixtral = (facts(f"smollm2_{name}") for name in ("granitemoe", "mixtral"))
    logits, vllm, llama_cpp = granitemoe["logits"], granitemoe["engine"], mixtral["engine"]
    exact = f"{logits['relative_difference_before_ties']:.1e}"
    if ties := len(logits["ties"]):
        exact += f"; {logits['relative_difference']:.2f} with {ties} ties"
    rows = [
        ("GraniteMoE, in transformers", f"{logits['tokens']:,} tokens", exact, granitemoe["generations"]),
        first_step(f"GraniteMoE, in {vllm['name']}", vllm),
        (
            "Mixtral, in transformers",
            f"{mixtral['logits']['tokens']:,} tokens",
            f"{mixtral['logits']['relative_difference']:.2g}",
            mixtral["generations"],
        ),
        first_step("Mixtral, in llama.cpp", llama_cpp),
    ]
    return table(
        {
            "export": name,
            "compared on": on,
            "largest difference / largest logit": difference,
            "identical generations": f"{generations['identical']} of {generations['prompts']}",
        }
        for name, on, difference, generations in rows
    )


def first_step(name: str, engine: dict) -> tuple[str, str, str, dict]:
    """An engine's row: it generates, and gives the logits of the first step."""
    difference = f"{engine['first_step']['relative_difference']:.2g}"
    return name, f"{engine['prompts']} prompts, one step", difference, engine


def headline() -> str:
    """The README's three figures."""
    cost, converted, _ = kept("minilm_movie_recovery")
    ffn, generating = times(one_token("t5-base")), times(generation("opt-1.3b"))
    return "\n".join(
        [
            f"- **{converted:.0%}** of the accuracy with {cost:.0%} of the feed-forward compute (MiniLM, converted).",
            f"- **{ffn}** the speed of a T5-base feed-forward network, per token on one CPU thread.",
            f"- **{generating}** the speed of generation, for a model of OPT-1.3B's shape.",
        ]
    )


BLOCKS = {
    function.__name__: function
    for function in (
        headline,
        results,
        sweep,
        prose,
        command,
        beside_training,
        specialisation,
        topics,
        removal,
        exports,
    )
}
