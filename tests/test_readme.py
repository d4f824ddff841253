"""The figures of the README, of docs/results.md and of the cards are those of the committed facts."""

import csv
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "recipes" / "figures"))
import prose_facts  # noqa: E402
import sweep_tables  # noqa: E402

from moefy_hf.modeling.routers import ROUTERS  # noqa: E402
from moefy_hf.modeling.selection import SELECTIONS  # noqa: E402
from moefy_hf.splitters import SPLITTERS  # noqa: E402

KNOWN = {path: json.loads(path.read_text()) for path in sorted((ROOT / "model_cards" / "facts").glob("*.json"))}
FACTS = [path for path, facts in KNOWN.items() if "rows" in facts]
PROSE = [path for path, facts in KNOWN.items() if "perplexities" in facts]
EXPORTS = [path for path, facts in KNOWN.items() if "logits" in facts]

ANALYSES = [path for path, facts in KNOWN.items() if "specialisation" in facts]


@pytest.fixture(scope="module")
def results():
    return (ROOT / "docs" / "results.md").read_text()


@pytest.mark.parametrize("path", FACTS, ids=lambda path: path.stem)
def test_the_results_show_the_facts(path, results):
    facts = json.loads(path.read_text())
    assert sweep_tables.tables(facts, ["relative_quality"]) in results
    assert facts["command"] in results


@pytest.mark.parametrize("path", FACTS, ids=lambda path: path.stem)
def test_the_card_shows_all_figures(path):
    """python recipes/sweep_tables.py model_cards/facts/NAME.json > model_cards/NAME.md"""
    card = (ROOT / "model_cards" / f"{path.stem}.md").read_text()
    assert card == sweep_tables.tables(json.loads(path.read_text())) + "\n"


@pytest.mark.parametrize("path", EXPORTS, ids=lambda path: path.stem)
def test_exports_are_as_they_were_measured(path):
    """Figures as recipes/serving/README.md shows them, and the command that gave them."""
    text, facts = (ROOT / "recipes" / "serving" / "README.md").read_text(), KNOWN[path]
    difference, generations = facts["logits"]["relative_difference"], facts["generations"]
    shown = f"{difference:.1e}".replace("e-0", "e-") if difference < 0.01 else f"{difference:.2f}"
    assert f"{shown} ({facts['logits']['tokens']:,} tokens)" in text
    assert f"{generations['identical']} of {generations['prompts']}" in text
    assert facts["command"] in " ".join(text.replace("\\\n", " ").split())


BENCHMARKS = sorted((ROOT / "kernels" / "moefy_ffn" / "benchmarks").glob("*.json"))


TOKENS = (1, 2, 4, 8, 128, 512, 2048)  # the columns of the table


def speed_line(found: dict) -> str:
    """A benchmark as a line of the README's table."""
    settings = found["settings"]
    parts = [settings["preset"], f"{settings['threads']} thread{'s' if settings['threads'] > 1 else ''}"]
    parts += ["bfloat16"] if settings["dtype"] == "bfloat16" else []
    parts += [f"experts of {settings['expert_size']}"] if settings["expert_size"] != 32 else []
    parts += ["low-rank router"] if settings["router"] == "LowRankRouter" else []
    parts += [f"{settings['share']:.0%} of the experts".replace("%", " %")] if settings["share"] != 0.2 else []
    parts += [f"{settings['nonzero']:.0%} non-zero".replace("%", " %")] if settings.get("nonzero") else []
    rows = {row["tokens"]: row for row in found["rows"] if row["implementation"] == "cpu"}
    cells = [f"{rows[n]['ratio']:.1f} ({rows[n]['ratio_best_dense']:.1f})" if n in rows else "" for n in TOKENS]
    return "| " + " | ".join([", ".join(parts), *cells]) + " |"


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_speeds_are_as_they_were_measured(path):
    assert speed_line(json.loads(path.read_text())) in (ROOT / "README.md").read_text()


def test_fine_experts_are_as_fast_as_they_were_measured():
    """Times dense of one token, relative to experts of 32."""

    def of_one_token(name: str) -> float:
        found = json.loads((ROOT / "kernels" / "moefy_ffn" / "benchmarks" / f"{name}.json").read_text())
        return next(row["ratio"] for row in found["rows"] if (row["implementation"], row["tokens"]) == ("cpu", 1))

    names = ("llama-1b_8", "llama-1b_4", "llama-1b_8_low_rank", "llama-1b_4_low_rank", "llama-1b_1_low_rank")
    shares = [f"{of_one_token(name) / of_one_token('llama-1b'):.2f}" for name in names]
    text = " ".join((ROOT / "README.md").read_text().split())
    assert "with one matrix, those of 8 and of 4 neurons decode at {} and {} times".format(*shares[:2]) in text
    assert "it is {} and {}, and {} for single neurons".format(*shares[2:]) in text


@pytest.mark.parametrize("preset", ["t5-base", "opt-1.3b"])
def test_generation_is_as_fast_as_it_was_measured(preset):
    found = json.loads((ROOT / "model_cards" / "speed" / f"{preset}_generate.json").read_text())
    ratio = next(row["ratio"] for row in found["rows"] if row["implementation"] == "cpu")
    name = {"t5-base": "T5-base {} times", "opt-1.3b": "OPT-1.3B {} times"}[preset].format(f"{ratio:.2f}")
    assert name in " ".join((ROOT / "README.md").read_text().split())


def whole_model(name: str) -> list[dict[str, str]]:
    with open(ROOT / "model_cards" / "speed" / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def times_dense(name: str, implementation: str) -> list[float]:
    """By share, where there are several."""
    return [float(row["times_dense"]) for row in whole_model(name) if row["implementation"] == implementation]


@pytest.mark.parametrize("name", ["minilm_batch_32", "minilm_batch_1", "smollm2_generate"])
def test_whole_models_are_as_they_were_measured(name):
    text = " ".join((ROOT / "README.md").read_text().split())
    if name == "smollm2_generate":
        assert [row["share"] for row in whole_model(name)[::4]] == ["0.2", "0.45", "0.7"]
        assert "generates {:.2f}, {:.2f} and {:.2f} times as fast".format(*times_dense(name, "auto")) in text
    else:
        assert f"{times_dense(name, 'cpu')[0]:.2f} times" in text
    assert all(1.09 <= round(1 / each, 2) <= 1.15 for each in times_dense(name, "masked"))


@pytest.mark.parametrize("path", PROSE, ids=lambda path: path.stem)
def test_the_results_show_perplexities(path, results):
    """python recipes/prose_facts.py model_cards/facts/NAME.json"""
    assert prose_facts.tables(KNOWN[path]) in results and KNOWN[path]["command"] in results


SUMMARY = {
    "minilm_movie_recovery": ("MiniLM with ReLU, movie polarity", 0.2),
    "minilm_r52_recovery": ("MiniLM with ReLU, Reuters R52", 0.2),
    "vit_fashion_recovery": ("ViT, Fashion-MNIST", 0.2),
    "t5_r8_recovery": ("T5, Reuters R8", 0.2),
    "minilm_movie_gelu": ("MiniLM with GELU, movie polarity", 0.3),
}


@pytest.mark.parametrize("name", SUMMARY)
def test_the_readme_sums_up(name):
    (title, share), rows = SUMMARY[name], KNOWN[ROOT / "model_cards" / "facts" / f"{name}.json"]["rows"]
    at = {row["router"]: row for row in rows if (row["share"], row["allocation"]) == (share, "sensitivity")}
    cells = [at["linear"]["ffn_flops"], at["linear"]["relative_quality"], at["linear, recovered"]["relative_quality"]]
    shown = (title, f"{cells[0]:.0%}", *(f"{cell:.1%}" for cell in cells[1:]))
    assert f"| {' | '.join(shown)} |" in (ROOT / "README.md").read_text()


def test_the_readme_sums_up_the_language_model():
    rows = KNOWN[ROOT / "model_cards" / "facts" / "smollm2_recovery.json"]["perplexities"]
    found = {
        ("recovery" in row["method"], row["k"]): row["relative_quality"] for row in rows if row["type"] == "level"
    }
    (control,) = (row["relative_quality"] for row in rows if row["router"] == "control")
    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"{found[False, 0.32]:.2f} times the dense perplexity at half of the FLOPs" in text
    assert f"and {found[False, 0.66]:.2f} times at three quarters without training" in text
    assert f"{found[True, 0.32]:.2f} and {found[True, 0.66]:.2f} times after 150,000 tokens" in text
    assert f"trained as long: {control:.2f}" in text


def test_a_recovered_language_model_beside_a_dense_one_that_was_trained_as_long(results):
    rows = KNOWN[ROOT / "model_cards" / "facts" / "smollm2_recovery.json"]["perplexities"]
    (control,) = (row["relative_quality"] for row in rows if row["router"] == "control")
    cost = {
        row["k"]: f"{row['relative_quality'] / control - 1:.0%}".replace("%", " %")
        for row in rows
        if row["type"] == "level" and "recovery" in row["method"]
    }
    text = " ".join(results.split())
    assert f"which without distillation comes to {control:.3f} of what it was" in text
    assert f'"level" costs {cost[0.32]} at half of the FLOPs and {cost[0.66]} at three quarters' in text


def test_a_conversion_takes_what_was_measured():
    found = json.loads((ROOT / "model_cards" / "conversion.json").read_text())
    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"takes {found['seconds']['all']} seconds and {found['peak_gigabytes']} GB for SmolLM2-135M" in text
    assert f"({found['layers']} layers, {found['calibration_tokens']:,} tokens" in text


def test_what_means_and_budgets_by_angles_are_worth():
    rows = KNOWN[ROOT / "model_cards" / "facts" / "smollm2_options.json"]["perplexities"]
    own = [row for row in rows if (row["method"]["router"], row["router"]) == ("linear", "own")]
    at_half = [row for row in own if row["k"] == 0.46]
    found = {(row["method"]["compensation"], row["allocation"]): row["relative_quality"] for row in at_half}
    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"from {found[False, 'uniform']:.2f} to {found[True, 'angular']:.2f} times dense perplexity" in text


def test_the_recipe_for_prose_takes_what_was_measured():
    seconds = json.loads((ROOT / "model_cards" / "prose_recipe.json").read_text())["seconds"]
    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"for serving engines, in {seconds / 60:.0f} minutes on 2 cores" in text


def analysis_of(name: str) -> tuple[dict, str]:
    """The facts of an analysis, and the README in one line."""
    path = ROOT / "model_cards" / "facts" / f"{name}.json"
    assert path in ANALYSES
    return KNOWN[path], " ".join((ROOT / "README.md").read_text().split())


def test_experts_of_newsgroups_are_as_they_were_analysed():
    facts, text = analysis_of("minilm_newsgroups_experts")
    routed, split, random = facts["specialisation"]
    shared = "profile over {} that neurons of an expert share"
    own, shuffled = (f"{100 * split[shared.format(each)]:.0f} %" for each in ("classes", "shuffled classes"))
    assert f"share {own} of their profile over classes ({shuffled} with shuffled" in text
    assert abs(random[shared.format("classes")]) < 0.005 and facts["analysis"]["texts"] == 4096
    explained = [f"{100 * row['variance that classes explain']:.0f} %" for row in (routed, split, random)]
    assert "classes explain {} of the variance of the routed experts' use, {} of it".format(*explained[:2]) in text
    assert f"their output, {explained[2]} in a random split" in text
    last, rows = facts["layers"][-1]["topics"], {row["experts off"]: row for row in facts["removal"]["together"]}
    times = [round(last[name][0][1]) for name in ("rec.sport.baseball", "misc.forsale", "sci.crypt")]
    assert times == [16, 15, 14]
    hockey, others = (
        {n: f"{100 * row[key]:.1f}" for n, row in rows.items()} for key in ("rec.sport.hockey", "all others")
    )
    assert f"falls from {hockey[0]} to {hockey[8]} %, that of all others from {others[0]} to {others[8]} %" in text
    assert f"without 16 they are {hockey[16]} and {others[16]} %, without 32 {hockey[32]} and {others[32]} %" in text


def test_experts_of_r52_are_as_they_were_analysed():
    facts, text = analysis_of("minilm_r52_experts")
    routed, split, random = facts["specialisation"]
    shared = "profile over {} that neurons of an expert share"
    assert f"share {split[shared.format('classes')]:.0%}".replace("%", " %") in text
    assert f"({split[shared.format('shuffled classes')]:.0%}".replace("%", " %") in text
    explained = [f"{row['variance that classes explain']:.0%}".replace("%", " %") for row in (random, split)]
    assert f"explain {explained[0]} of the variance of their use, {explained[1]} with" in text
    assert random["experts with a class"] == 1 and abs(random[shared.format("classes")]) < 0.005
    last, rows = facts["layers"][-1]["topics"], {row["experts off"]: row for row in facts["removal"]["together"]}
    times = [round(last[name][0][1]) for name in ("crude", "interest", "sugar")]
    assert times == [26, 26, 21] and facts["analysis"]["texts"] == 5878
    assert f"falls from {100 * rows[0]['crude']:.1f} to" in text
    for row, name in ((rows[16], "crude"), (rows[16], "all others"), (rows[32], "crude")):
        assert f"{row[name]:.1%}".replace("%", " %") in text
    by_chance = rows[16]
    assert f"{100 * by_chance['random: crude']:.1f} and {100 * by_chance['random: all others']:.1f} %" in text


def test_every_fact_is_shown():
    assert FACTS and EXPORTS and len(FACTS) + len(PROSE) + len(EXPORTS) + len(ANALYSES) == len(KNOWN)


@pytest.mark.parametrize("path", ["README.md", "docs/results.md", "recipes/serving/README.md"])
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^):]+)\)", (ROOT / path).read_text())
    assert links
    for link in links:
        file, _, section = link.partition("#")
        target = (ROOT / path).parent / file if file else ROOT / path
        assert target.exists() and (not section or section in sections(target)), link


def sections(path: Path) -> list[str]:
    """What links call the headings of a Markdown file."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize(
    ("title", "known"),
    [("splitter | groups", SPLITTERS), ("router | scores", ROUTERS), ("type | a token computes", SELECTIONS)],
)
def test_every_method_is_described(title, known):
    table = (ROOT / "README.md").read_text().partition(f"| {title} ")[2].partition("\n\n")[0]
    assert re.findall(r"^ *\| `(\w+)` \|", table, re.M) == list(known)
