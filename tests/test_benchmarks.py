"""Tasks of lm-eval on MoEfied models: the command, the facts, the card, and what the Hub shows. No network."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import parse_eval_result_entries
from test_cli import number_tokenizer
from tiny import convert, tiny_model

from moefy_hf import load
from moefy_hf.cli.main import main
from moefy_hf.evaluation import benchmarks
from moefy_hf.hub.card import model_card
from moefy_hf.hub.facts import read_facts

pytestmark = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval")

EXAMPLES = 12
TASK = {
    "task": "numbers",
    "output_type": "multiple_choice",
    "doc_to_text": "text",
    "doc_to_target": "label",
    "doc_to_choice": "choices",
    "test_split": "test",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}
MADE_HERE = """
import datasets


def made(**settings):
    return datasets.load_dataset("json", data_files={"test": "FILE"})
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with two tasks on the same rows: "numbers" of a file, "on_the_hub" of a data set with a Hub's name."""
    folder = tmp_path_factory.mktemp("tasks")
    numbers = torch.randint(3, 99, (EXAMPLES, 8), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [
        {"text": " ".join(map(str, row[:6])), "choices": [str(row[6]), str(row[7])], "label": i % 2}
        for i, row in enumerate(numbers)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    of_file = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}}
    (folder / "numbers.yaml").write_text(yaml.safe_dump(TASK | of_file))
    (folder / "made.py").write_text(MADE_HERE.replace("FILE", str(folder / "rows.jsonl")))
    named = TASK | {"task": "on_the_hub", "dataset_path": "acme/numbers", "dataset_name": "main"}
    (folder / "named.yaml").write_text(yaml.safe_dump(named) + "custom_dataset: !function made.made\n")
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks") / "moe"
    model = tiny_model("llama-without-biases", "AutoModelForCausalLM")
    convert(model, k=2)
    model.save_pretrained(folder)
    number_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def moe(saved, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    # asks compilers and package managers for their versions, which takes seconds
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    return shutil.copytree(saved, tmp_path / "moe")


@pytest.fixture
def run(tasks, capsys):
    def evaluated(*words: str) -> dict:
        main(["eval", *map(str, words), "--include_path", str(tasks), "--json"])
        return json.loads(capsys.readouterr().out)

    return evaluated


def by_hand(folder, tasks, k: int | float | None) -> float:
    """Accuracy: how often the choice with the larger probability after the text is the right one."""
    model, tokenizer, right = load(folder).eval(), number_tokenizer(), 0
    if k is not None:
        model.set_selection(k=k)
    for line in (tasks / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokenizer(row["text"])["input_ids"]])).logits[0, -1]
        scores = [logits[tokenizer(choice)["input_ids"][0]].item() for choice in row["choices"]]
        right += scores.index(max(scores)) == row["label"]
    return right / EXAMPLES


def scores(result: dict, task: str) -> dict[str, float]:
    rows = [row for row in result["rows"] if (row["task"], row["metric"]) == (task, "acc")]
    return {row["budget"]: row["value"] for row in rows}


def test_budgets_beside_dense(moe, tasks, run, tmp_path):
    words = ["--tasks", "numbers", "on_the_hub", "--k", "1", "0.5", "--batch_size", "4"]
    result = run(moe, *words, "--output", tmp_path / "out.json")
    expected = {
        "dense": by_hand(moe, tasks, 1.0),
        "k=1": by_hand(moe, tasks, 1),
        "k=0.5": by_hand(moe, tasks, 0.5),
    }
    assert scores(result, "numbers") == scores(result, "on_the_hub") == expected
    head, _, *lines = result["table"].splitlines()
    assert head == "| task | metric | shots | examples | dense | k=1 | k=0.5 |" and len(lines) == 4
    assert all(row["examples"] == EXAMPLES and row["shots"] == 0 and row["stderr"] > 0 for row in result["rows"])
    kept = {key: result[key] for key in ("facts", "rows")}
    assert json.loads((tmp_path / "out.json").read_text()) == kept == read_facts(moe)["benchmarks"]
    card = str(model_card(moe))
    assert result["table"] in card and "## Benchmarks" in card and "try-outs" not in card
    # a file for each budget, of the task whose rows are a data set of the Hub; none for the dense model
    names = ["on_the_hub_k_0.5.yaml", "on_the_hub_k_1.yaml"]
    assert sorted(path.name for path in (moe / ".eval_results").iterdir()) == names
    values = [yaml.safe_load(Path(path).read_text())[0]["value"] for path in result["eval_results"]]
    assert values == [expected["k=1"], expected["k=0.5"]]


def test_the_models_own_budget_and_what_the_hub_reads(moe, tasks, run):
    result = run(moe, "--tasks", "on_the_hub")
    found = scores(result, "on_the_hub")
    assert found == {"own budget": by_hand(moe, tasks, None)}
    (path,) = result["eval_results"]
    assert Path(path) == moe / ".eval_results" / "on_the_hub.yaml"
    (entry,) = parse_eval_result_entries(yaml.safe_load(Path(path).read_text()))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("acme/numbers", "main", found["own budget"])
    assert "acc, 0-shot" in entry.notes and "2 experts" in entry.notes and entry.date == result["facts"]["date"]


def test_a_part_of_a_task_is_no_result(moe, run, caplog):
    result = run(moe, "--tasks", "on_the_hub", "--limit", "5")
    assert {row["examples"] for row in result["rows"]} == {5} and result["eval_results"] == []
    assert not (moe / ".eval_results").exists() and "try-outs, no results" in str(model_card(moe))


def test_the_harness_itself_runs_the_checkpoint(moe, tasks):
    """What `lm_eval --model hf --model_args ...` calls gets what `moefy eval` gets."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        "hf",
        f"pretrained={moe},trust_remote_code=True",
        tasks=["numbers"],
        device="cpu",
        task_manager=TaskManager(include_path=tasks, include_defaults=False),
    )
    assert found["results"]["numbers"]["acc,none"] == by_hand(moe, tasks, None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "numberz"], "did you mean numbers"),
        (["--tasks", "numbers", "--k", "7.5"], "7.5"),
        (["--tasks", "numbers", "--limit", "0"], "--limit"),
        (["--tasks", "numbers", "--num_fewshot", "-1"], "--num_fewshot"),
        (["--tasks", "numbers", "--output", "/no/such/folder/out.json"], "/no/such/folder"),
        (["--tasks", "numbers", "--include_path", "/no/such/folder"], "/no/such/folder"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(saved, tasks, words, message, capsys, monkeypatch):
    from lm_eval.tasks import TaskManager

    few = TaskManager(include_path=tasks, include_defaults=False)  # all take half a minute
    monkeypatch.setattr(benchmarks, "all_tasks", lambda include_path: few)
    with pytest.raises(SystemExit) as stopped:
        main(["eval", str(saved), "--include_path", str(tasks), *words])
    error = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and error.startswith("moefy eval: ") and message in error
    assert "benchmarks" not in read_facts(saved)


def test_models_that_generate_nothing(tasks, tmp_path, capsys):
    model = tiny_model("bert", "AutoModelForSequenceClassification")
    convert(model, k=2)
    model.save_pretrained(tmp_path / "moe")
    number_tokenizer().save_pretrained(tmp_path / "moe")
    with pytest.raises(SystemExit):
        main(["eval", str(tmp_path / "moe"), "--include_path", str(tasks), "--tasks", "numbers"])
    assert "does not generate text" in capsys.readouterr().err
