"""The language-model recipe end to end: a tiny Llama reads texts of a few words."""

import json
import random
from pathlib import Path

import prose_facts
import prose_grid
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from moefy_hf import MoEficationConfig, Sweep, evaluate, moefy_
from moefy_hf.hub.facts import read_facts
from moefy_hf.recipes import prose
from moefy_hf.recipes.arguments import HeldOutArguments, ProseDataArguments

CONFIG = Path(__file__).parents[2] / "recipes" / "configs" / "smollm2" / "moefication.yaml"
TOP_2 = {"type": "top_k", "k": 2, "allocation": "uniform"}


@pytest.fixture
def texts(inputs, tmp_path):
    """A tiny Llama with a tokenizer, and three folders of texts in which each word decides the next one."""
    folder, choose = tmp_path / "inputs", random.Random(0)
    tokenizer = AutoTokenizer.from_pretrained(inputs["model"])
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    for name, files, words in (("speeches", 4, 900), ("plays", 2, 900), ("whales", 2, 200), ("angels", 1, 200)):
        (folder / name).mkdir()
        for number in range(files):
            start = choose.randrange(20)
            text = " ".join(f"word{(start + 7 * i) % 20}" for i in range(words))
            (folder / name / f"{number}.txt").write_text(text)
    (folder / "whales" / "SOURCE.md").write_text("not a text")
    return folder


@pytest.fixture
def recipe(texts, run_config):
    def run(output_dir: Path, task="causal_lm", **settings) -> None:
        small = {
            "model_name_or_path": str(texts / "model"),
            "dataset_name": [str(texts / "speeches"), str(texts / "plays")],
            "held_out_name": [str(texts / "whales"), str(texts / "angels")],
            "max_seq_length": 16,
            "train_tokens": 2000,
            "held_out_tokens": 160,
            "generated_tokens": 6,
            "output_dir": str(output_dir),
            "calibration_tokens": 500,
            "budgets": [0.5, 1.0],
            "learning_rate": 0.02,
            "per_device_train_batch_size": 8,
        }
        run_config(task, CONFIG, **(small | settings))

    return run


def loss_of(model, blocks) -> float:
    with torch.no_grad():
        return float(model(input_ids=blocks, labels=blocks).loss)


def test_a_pretrained_model(recipe, refused, texts, tmp_path, capsys):
    run = tmp_path / "run"
    recipe(run, controls=["random", "wina"])
    sweep = Sweep.load(run / "sweep.json")
    assert sweep.facts["quality"] == "perplexity" and sweep.facts["positions"] == 20 * 15
    assert [row["router"] for row in sweep.rows] == ["dense", *["own"] * 2, *["random"] * 2, *["wina"] * 2]
    dense, moefied = (json.loads((run / f"prose_{name}.json").read_text()) for name in ("dense", "moefied"))
    assert set(dense["perplexity"]) == {"whales", "angels"}
    assert set(moefied["perplexity"]) == {
        f"{text} at {share}" for text in ("whales", "angels") for share in (0.5, 1.0)
    }
    for text in ("whales", "angels"):
        assert moefied["perplexity"][f"{text} at 1.0"] == pytest.approx(dense["perplexity"][text], rel=1e-4)
        assert moefied["perplexity"][f"{text} at 0.5"] != pytest.approx(dense["perplexity"][text], rel=1e-3)
    both = torch.tensor(list(dense["perplexity"].values())).log().mean().exp()  # as many tokens of each
    assert float(both) == pytest.approx(sweep.rows[0]["perplexity"], rel=1e-4)
    assert len(dense["continuations"]) == 4 and all(each["continuation"] for each in dense["continuations"])
    shown = prose_facts.facts_of([run])
    assert len(shown["perplexities"]) == 6 and shown["dense"] == sweep.rows[0]["perplexity"]
    half = next(row for row in shown["perplexities"] if (row["router"], row["k"]) == ("own", 0.5))
    assert half["texts"]["whales"] == moefied["perplexity"]["whales at 0.5"] / dense["perplexity"]["whales"]
    assert half["relative_quality"] == sweep.rows[1]["relative_quality"] and half["seeds"] == [0]
    cell = f"{half['relative_quality']:.3f} ({half['ffn_flops']:.0%})"
    line = f"| output_aware of 8 neurons, linear |  | {cell} |  |  | 1.000 (100%) |"
    assert line in prose_facts.tables(shown) and "| *wina*, of the dense model | " in prose_facts.tables(shown)
    facts = read_facts(run / "moefied")
    assert facts["calibration"] == {"data": "speeches and plays", "split": "train"}
    assert facts["evaluation"] == {"data": "whales and angels"} and facts["prediction"]["positions"] > 50
    converted = AutoModelForCausalLM.from_pretrained(run / "moefied", trust_remote_code=True)
    served = AutoModelForCausalLM.from_pretrained(run / "served")
    blocks = torch.randint(4, 24, (4, 16), generator=torch.Generator().manual_seed(0))
    assert type(served).__name__ == "GraniteMoeForCausalLM"
    assert loss_of(served, blocks) == pytest.approx(loss_of(converted, blocks), abs=1e-5)
    original = AutoModelForCausalLM.from_pretrained(texts / "model")
    assert loss_of(AutoModelForCausalLM.from_pretrained(run / "dense"), blocks) == loss_of(original, blocks)
    capsys.readouterr()
    recipe(run, controls=["random", "wina"], learning_rate=0.02, logging_steps=3)  # nothing of this is trained
    out = capsys.readouterr().out
    assert all(
        f"{name}: done before" in out for name in ("dense", "moefied", "sweep.json", "prose_moefied.json", "served")
    )
    again = {"controls": ["none"], "budgets": [0.5], "export": True, "dataset_name": [str(texts / "plays")]}
    recipe(tmp_path / "again", recover=str(run / "moefied"), max_steps=1, **again)
    assert f"exported: {tmp_path / 'again'}" not in capsys.readouterr().out
    scores = json.loads((tmp_path / "again" / "prose_dense.json").read_text())["perplexity"]
    assert scores == pytest.approx(dense["perplexity"], rel=1e-4)  # with all experts it is the dense model
    assert read_facts(tmp_path / "again" / "recovered")["calibration"]["data"] == "speeches and plays"
    with refused("held_out_tokens changed"):
        recipe(run, controls=["random", "wina"], held_out_tokens=80)


def test_recovery_on_a_token_budget(recipe, tmp_path):
    run = tmp_path / "run"
    recipe(run, controls=["none"], budgets=[0.5], k=0.5, recovery_epochs=12, gradient_accumulation_steps=1)
    found = {
        name: json.loads((run / f"prose_{name}.json").read_text())["perplexity"]
        for name in ("dense", "moefied", "recovered", "control")
    }
    assert found["recovered"]["whales at 0.5"] < 0.5 * found["moefied"]["whales at 0.5"]
    assert found["control"]["angels"] < 0.5 * found["dense"]["angels"]
    model = AutoModelForCausalLM.from_pretrained(run / "recovered", trust_remote_code=True)
    assert len(model.moe_sites()) == 2 and not any("lora" in name for name, _ in model.named_parameters())
    assert "recovery_epochs" in read_facts(run / "recovered")["training"]
    rows = prose_facts.facts_of([run])["perplexities"]
    recovered = next(row for row in rows if "recovery" in row["method"] and row["router"] == "own")
    both = {
        name: torch.tensor([found[name][text + end] for text in ("whales", "angels")]).log().mean()
        for name, end in (("dense", ""), ("recovered", " at 0.5"), ("control", ""))
    }
    assert recovered["relative_quality"] == pytest.approx(float((both["recovered"] - both["dense"]).exp()), rel=1e-4)
    control = next(row for row in rows if row["router"] == "control")
    assert control["relative_quality"] == pytest.approx(float((both["control"] - both["dense"]).exp()), rel=1e-4)
    shown = prose_facts.tables(prose_facts.facts_of([run]))
    assert "recovered at 50% of the experts on 24,000 tokens |" in shown and "the dense model, trained on 24" in shown


def test_a_learned_selection_stands_beside_budgets(recipe, tmp_path):
    run = tmp_path / "run"
    settings = {"controls": ["none"], "budgets": [0.5], "router": "sigmoid", "learned_eta": 0.1}
    recipe(run, recovery_epochs=6, recovery_parameters="lora", gradient_accumulation_steps=1, **settings)
    learned = json.loads((run / "recovered.json").read_text())["rows"][-1]
    assert learned["type"] == "level" and 0 < learned["experts"] < 1
    found, dense = (
        json.loads((run / f"prose_{name}.json").read_text())["perplexity"] for name in ("recovered", "dense")
    )
    assert set(found) == {f"{text} {at}" for text in ("whales", "angels") for at in ("as learned", "at 0.5")}
    both = torch.tensor([found[f"{text} as learned"] for text in ("whales", "angels")]).log().mean().exp()
    assert float(both) == pytest.approx(learned["perplexity"], rel=1e-4)
    facts = prose_facts.facts_of([run])
    (row,) = (row for row in facts["perplexities"] if row["allocation"] == "learned")
    assert (row["type"], row["k"]) == ("level", learned["experts"]) and row["method"]["recovery"]["learned_eta"] == 0.1
    assert row["texts"]["whales"] == found["whales as learned"] / dense["whales"]
    (control,) = (row for row in facts["perplexities"] if row["router"] == "control")
    assert "learned_eta" not in control["method"]["recovery"]
    shown = prose_facts.tables(facts)
    assert "sigmoid, level, recovered with learned budgets on 12,000 tokens, learned budgets | " in shown
    assert f"learned budgets | {learned['experts']:.0%} | {row['texts']['whales']:.3f} | " in shown


def test_what_two_runs_have_of_one_seed_counts_once():
    cell = {"method": {}, "router": "own", "type": "top_k", "allocation": "uniform", "k": 0.5, "ffn_flops": 0.5}
    read, swept, other = (
        cell | {"seed": seed, "relative_quality": quality, "texts": texts}
        for seed, quality, texts in ((0, 1.5, {"whales": 1.4}), (0, 1.5, {}), (1, 2.5, {"whales": 2.0}))
    )
    for cells in ([swept, read], [read, swept]):
        (row,) = prose_facts.average(cells)
        assert (row["seeds"], row["texts"]) == ([0], {"whales": 1.4}) and "relative_quality_sd" not in row
    (row,) = prose_facts.average([read, swept, other])
    assert row["seeds"] == [0, 1] and row["relative_quality"] == 2 and row["texts"]["whales"] == pytest.approx(1.7)


def test_a_grid_of_routers_and_splits_at_equal_flops(recipe, texts, tmp_path, capsys):
    run, facts = tmp_path / "run", tmp_path / "facts" / "grid.json"
    settings = {"facts": str(facts), "flops": [0.5, 0.9], "controls": ["oracle"], "budgets": [0.5]}
    grid = {"splitters": ["gate_clustering"], "routers": ["linear", "mean_gate"], "expert_sizes": [2, 8]}
    recipe(run, prose_grid.main, **settings, **grid)
    found = json.loads(facts.read_text())
    assert found["positions"] == 20 * 15 and prose_facts.tables(found) in capsys.readouterr().out
    rows = found["perplexities"]
    by = {(row["method"]["router"], row["method"]["expert_size"], row["router"], row["k"]): row for row in rows}
    # 32 x 48 SwiGLU: a linear router costs 1/(3 m) of the FFN, and a budget is met to half an expert
    assert {key[:3] for key in by} == {
        (router, size, who)
        for router, size, who in (
            *[("linear", size, who) for size in (2, 8) for who in ("own", "oracle")],
            *[("mean_gate", size, "own") for size in (2, 8)],
        )
    }
    for budget, size in ((0.5, 2), (0.9, 2), (0.5, 8), (0.9, 8)):
        k = round((budget - 1 / (3 * size)) * 48 / size) / (48 / size)
        own, oracle = by["linear", size, "own", k], by["linear", size, "oracle", k]
        assert own["ffn_flops"] == pytest.approx(budget, abs=size / 48 / 2 + 1e-6)
        assert oracle["ffn_flops"] == pytest.approx(k) and 0 <= oracle["output_error"] < own["output_error"]
    shown = prose_facts.tables(found)
    own = [row for row in rows if row["method"]["router"] == "mean_gate"]
    most = [
        max((row for row in own if row["method"]["expert_size"] == size), key=lambda row: row["k"]) for size in (2, 8)
    ]
    cells = [f"{row['relative_quality']:.3f} ({row['ffn_flops']:.0%})" for row in most]
    assert "| 90% of the FLOPs, experts of | 2 neurons | 8 neurons |" in shown
    assert f"| gate_clustering, mean_gate | {' | '.join(cells)} |" in shown
    other = grid | {"routers": ["linear", "analytic"], "splitters": ["gate_clustering", "random"], "seeds": [0, 1]}
    recipe(run, prose_grid.main, **settings | {"controls": ["none"]}, **other)  # goes on
    out = capsys.readouterr().out
    assert "gate_clustering-2-linear-0.5,0.9.json: done before" in out and "8 neurons, analytic router, seed 1" in out
    both = json.loads(facts.read_text())["perplexities"]
    split = [row for row in both if row["method"]["splitter"] == "random" and row["method"]["router"] == "linear"]
    assert len(split) == 4 and all(row["seeds"] == [0, 1] and row["relative_quality_sd"] > 0 for row in split)
    model = AutoModelForCausalLM.from_pretrained(texts / "model")
    moefy_(model, MoEficationConfig(expert_size=2, splitter="gate_clustering", router="mean_gate", selection=TOP_2))
    tokenizer = AutoTokenizer.from_pretrained(texts / "model")
    asked = HeldOutArguments([str(texts / "whales"), str(texts / "angels")], held_out_tokens=160)
    data = ProseDataArguments([str(texts / "plays")], max_seq_length=16, train_tokens=2000)
    held_out = prose.load_prose(data, asked, tokenizer, seed=0)
    batches = [prose.collate(list(held_out[name])) for name in ("whales", "angels")]
    k = next(key[3] for key in by if key[:3] == ("mean_gate", 2, "own") and by[key]["ffn_flops"] < 0.7)
    (row,) = evaluate(model, batches, [k], controls=[], local_tokens=0, progress=False).rows[1:]
    assert row["relative_quality"] == pytest.approx(by["mean_gate", 2, "own", k]["relative_quality"], rel=1e-5)


def test_cells_of_a_grid_are_of_what_their_name_does_not_say(recipe, refused, tmp_path):
    run, facts = tmp_path / "run", tmp_path / "grid.json"
    grid = {"splitters": ["random"], "routers": ["low_rank"], "expert_sizes": [8], "flops": [0.5]}
    grid["facts"] = str(facts)
    recipe(run, prose_grid.main, **grid, controls=["none"], router_settings=["rank=3"])
    assert "| random of 8 neurons, low_rank rank=3 | " in prose_facts.tables(json.loads(facts.read_text()))
    for name, value in (("router_settings", ["rank=2"]), ("calibration_tokens", 400)):
        changed = {"controls": ["none"], "router_settings": ["rank=3"], name: value}
        with refused(rf"results of other settings \({name} changed\)"):
            recipe(run, prose_grid.main, **grid, **changed)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"flops": [0.5, 1.5]}, "in \\(0, 1\\], got 1.5"),
        ({"routers": ["linaer"]}, "unknown router 'linaer'"),
        ({"expert_sizes": [7]}, "48 neurons.*size 7"),
        ({"num_experts": 6}, "num_experts=6: .*expert_sizes"),
        ({"compensation": True}, "compensation=True: "),
        ({"routers": ["low_rank", "linear"], "router_settings": ["rank=3"]}, "LinearRouter has no setting 'rank'"),
    ],
)
def test_mistakes_in_a_grid(recipe, refused, tmp_path, settings, message):
    with refused(message):
        recipe(tmp_path / "run", prose_grid.main, facts=str(tmp_path / "facts.json"), **settings)
    assert not list((tmp_path / "run").rglob("dense")) and not (tmp_path / "facts.json").exists()


def test_blocks(texts):
    tokenizer = AutoTokenizer.from_pretrained(texts / "model")
    settings = {"dataset_name": [str(texts / "speeches")], "max_seq_length": 10, "train_tokens": 500}
    asked = HeldOutArguments([str(texts / "angels" / "0.txt")], held_out_tokens=40)
    found = prose.load_prose(ProseDataArguments(**settings), asked, tokenizer, seed=0)
    assert {name: len(rows) for name, rows in found.items()} == {"train": 50, "validation": 8, "0": 4}
    whole = tokenizer((texts / "angels" / "0.txt").read_text())["input_ids"]
    cut = [whole[start : start + 10] for start in range(0, len(whole) - 9, 10)]
    assert all(row in cut for row in found["0"]["input_ids"]) and all(
        len(row) == 10 for row in found["train"]["input_ids"]
    )
    streamed = prose.load_prose(ProseDataArguments(**settings, streaming=True), asked, tokenizer, seed=0)
    assert {name: len(rows) for name, rows in streamed.items()} == {name: len(rows) for name, rows in found.items()}
    assert all(row in cut for row in streamed["0"]["input_ids"])


def test_splits_of_one_data_set(texts):
    folder = texts / "table"
    folder.mkdir()
    for split in ("train", "validation", "test"):
        (folder / f"{split}.csv").write_text("text\n" + "\n".join(["word1 word2 word3 word4 word5"] * 60))
    tokenizer = AutoTokenizer.from_pretrained(texts / "model")
    data = ProseDataArguments([str(folder)], max_seq_length=8, train_tokens=200)
    found = prose.load_prose(data, HeldOutArguments(held_out_tokens=40), tokenizer, seed=0)
    assert {name: len(rows) for name, rows in found.items()} == {
        "train": 25,
        "validation": 8,
        "table-validation": 5,
        "table-test": 5,
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text_column": "words"}, "no column 'words'; it has text"),
        ({"train_split": "trian"}, "no split 'trian'; it has train"),
        ({"train_tokens": 1}, "train_tokens must be at least 2, got 1"),
        ({"max_seq_length": 700}, "blocks of 700 tokens.*at least 16 are needed"),
        ({"schedule": "anneal"}, "not used .*schedule"),
        ({"controls": ["x"]}, "unknown control 'x'"),
        ({"expert_size": 7}, "48 neurons.*size 7"),
    ],
)
def test_mistakes_are_named_before_any_work(recipe, refused, tmp_path, settings, message):
    with refused(message):
        recipe(tmp_path / "run", **settings)
    assert not (tmp_path / "run" / "dense").exists()
