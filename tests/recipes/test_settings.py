"""Settings from files and the command line, and which of them are found wrong."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import yaml
from transformers import TrainingArguments

from moefy_hf import MoEficationConfig
from moefy_hf.recipes import arguments as of
from moefy_hf.recipes.settings import Arguments, check, checking
from moefy_hf.recipes.settings import parse as parse_settings
from moefy_hf.recipes.tasks import task

RECIPES = Path(__file__).parents[2] / "recipes"


@dataclass
class Numbers:
    count: int = 1
    rate: float = 0.5
    shares: list[float] = field(default_factory=lambda: [0.1])
    flag: bool = False
    name: str | None = None


@pytest.fixture
def parse(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)  # a CPU adds a setting of TrainingArguments

    def run(yaml: str | None, *arguments: str, types=(Numbers,)):
        if yaml is None:
            return parse_settings(types, "about", list(arguments)).parts[:-1]
        (tmp_path / "config.yaml").write_text(yaml)
        return parse_settings(types, "about", ["--config", str(tmp_path / "config.yaml"), *arguments]).parts[:-1]

    return run


def test_settings_from_a_file_and_the_command_line(parse):
    file = "count: 3\nrate: 1.0e-4\nshares: [0.2, 0.3]\nflag: true\nname: null\n"
    assert parse(file) == [Numbers(3, 1e-4, [0.2, 0.3], True, None)]
    assert parse(file, "--count", "4", "--shares", "0.5", "--flag", "false") == [Numbers(4, 1e-4, [0.5], False)]
    assert parse(None) == [Numbers()]
    assert parse(None, "--flag") == [Numbers(flag=True)]
    assert parse("count: -3\nname: 'two words'\n") == [Numbers(count=-3, name="two words")]


def test_a_later_file_wins(parse, tmp_path):
    (tmp_path / "second.yaml").write_text("count: 9\n")
    assert parse("count: 3\nrate: 2\n", "--config", str(tmp_path / "second.yaml")) == [Numbers(9, 2.0)]


@pytest.mark.parametrize("name", ["number", "counts", "cou"])  # no abbreviations either
def test_unknown_names_are_errors(parse, name, capsys):
    for attempt in (lambda: parse(f"{name}: 3\n"), lambda: parse(None, f"--{name}", "3")):
        with pytest.raises((ValueError, SystemExit)) as error:
            attempt()
        assert name in str(error.value) + capsys.readouterr().err


def test_config_needs_a_file(parse):
    with pytest.raises(ValueError, match="YAML"):
        parse(None, "--config")
    with pytest.raises(ValueError, match="nowhere.yaml: there is no such file"):
        parse(None, "--config", "nowhere.yaml")


def test_a_cpu_is_asked_for_where_there_is_nothing_else(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    words = ["--output_dir", str(tmp_path), "--bf16", "true"]
    arguments = parse_settings((TrainingArguments,), "about", words)
    assert arguments[TrainingArguments].use_cpu and arguments[TrainingArguments].bf16


def test_a_conversion_has_the_defaults_of_its_config(tmp_path):
    words = ["--output_dir", str(tmp_path), "--seed", "7", "--use_cpu", "true"]
    assert parse_settings((TrainingArguments,), "about", words)[MoEficationConfig] == MoEficationConfig(seed=7)
    assert parse_settings((Numbers,), "about", [])[MoEficationConfig] == MoEficationConfig()


def test_a_conversion_is_set_by_file_and_command_line(tmp_path):
    (tmp_path / "config.yaml").write_text("k: 4\nrouter: low_rank\nrouter_settings: {rank: 3}\nallocation: uniform\n")
    words = ["--config", str(tmp_path / "config.yaml"), "--allocation", "angular"]
    config = parse_settings((Numbers,), "about", words)[MoEficationConfig]
    assert config == MoEficationConfig(k=4, router="low_rank", router_settings={"rank": 3}, allocation="angular")
    config = parse_settings((Numbers,), "about", [*words, "--router_settings", "rank=5", "--k", "0.3"])[
        MoEficationConfig
    ]
    assert config.router_settings == {"rank": 5} and config.k == 0.3


def test_arguments_are_found_by_their_class():
    numbers, data = Numbers(3), of.TextDataArguments("texts")
    arguments = Arguments([data, numbers])
    assert arguments[Numbers] is numbers and arguments.data is data
    assert Numbers in arguments and of.OutputArguments not in arguments
    assert arguments.replaced(Numbers(4))[Numbers].count == 4 and arguments[Numbers].count == 3
    with pytest.raises(KeyError, match="OutputArguments"):
        arguments[of.OutputArguments]


def test_what_is_wrong_is_one_line_and_status_2(capsys):
    with pytest.raises(SystemExit) as ended, checking():
        raise ValueError("one\n  thing")
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert err.endswith("error: one thing\n") and err.count("\n") == 1
    with pytest.raises(RuntimeError), checking():  # a bug shows where it is
        raise RuntimeError


def test_defaults_are_valid_settings():
    budgets = of.EvaluationArguments().budgets
    assert budgets and all(0 < budget <= 1 for budget in budgets)


CONFIGS = sorted(RECIPES.glob("configs/**/*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: "/".join(path.parts[-2:]))
def test_configs_say_what_published_figures_depend_on(path):
    """A later change of defaults leaves them as they are."""
    given = yaml.safe_load(path.read_text())
    assert {"splitter", "router", "k", "allocation", "calibration_tokens", "expert_size", "seed"} <= given.keys()


TASK_OF = {"smollm2": "causal_lm", "t5_r8": "seq2seq", "vit_fashion": "image_classification"}
TASK_OF |= {"minilm_oanc": "token_classification", "minilm_cloze": "question_answering"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: "/".join(path.parts[-2:]))
def test_configs_are_good_settings_of_their_recipe(path):
    types = task(TASK_OF.get(path.parent.name, "classification")).types
    arguments = parse_settings(types, "about", ["--config", str(path), "--use_cpu", "true"])
    check(arguments)
    given = yaml.safe_load(path.read_text())
    assert arguments[MoEficationConfig].k == given["k"]
    assert arguments[of.EvaluationArguments].budgets == given.get("budgets", [0.05, 0.1, 0.2, 0.3])
