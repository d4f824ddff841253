"""A tiny checkpoint and tiny texts, and a way to run a recipe on them in this process."""

import contextlib
import random
import re
import sys
from functools import partial
from pathlib import Path

import datasets
import pytest
import torch
import transformers
import yaml
from tiny import VOCAB
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from moefy_hf.evaluation import plots
from moefy_hf.recipes.tasks import main as run_task

RECIPES = Path(__file__).parents[2] / "recipes"
sys.path.insert(0, str(RECIPES / "figures"))

classify = partial(run_task, "classification")

NEUTRAL = [f"word{number}" for number in range(20)]
MOOD = {"good": ["superb", "fine"], "bad": ["awful", "dull"]}


@pytest.fixture(autouse=True, scope="module")
def pictures_are_quick(request):
    """Drawing takes as long as converting: test_moefy_classification.py does, others get a picture of nothing."""
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__ != "test_moefy_classification":
            patch.setattr(plots, "plot_sweep", lambda sweep, path: Path(path).write_bytes(b"\x89PNG"))
        yield


@pytest.fixture
def refused():
    """A context in which a script ends with status 2, for a reason that matches."""

    @contextlib.contextmanager
    def expect(message: str):
        with pytest.raises(SystemExit) as ended:
            yield
        assert ended.value.code == 2
        assert re.search(message, str(ended.value.__cause__)), ended.value.__cause__

    return expect


@pytest.fixture(scope="session")
def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the words that tests/tiny.py's models know: Word0, Word1, ..."""
    words = ["[UNK]", "<s>", "</s>", *(f"Word{number}" for number in range(VOCAB - 3))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="</s>")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, str]:
    """A tiny checkpoint with its tokenizer, and a folder of csv files in which one word decides the label."""
    folder, choose = tmp_path_factory.mktemp("inputs"), random.Random(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *NEUTRAL, *MOOD["good"], *MOOD["bad"]]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=0,
        initializer_range=0.1,
    )
    transformers.BertModel(config).save_pretrained(folder / "model")
    (folder / "texts").mkdir()
    for split, rows in (("train", 256), ("validation", 24), ("test", 24)):
        lines = ["text,label"]
        for _ in range(rows):
            label = choose.choice(["good", "bad"])
            text = choose.choices(NEUTRAL, k=choose.randint(1, 9)) + [choose.choice(MOOD[label])]
            choose.shuffle(text)
            lines.append(f"{' '.join(text)},{label}")
        (folder / "texts" / f"{split}.csv").write_text("\n".join(lines) + "\n")
    return {"model": str(folder / "model"), "texts": str(folder / "texts")}


@pytest.fixture(scope="module")
def recipe(inputs, tmp_path_factory):
    """Run a task, or the `main` of a script, with these settings in place of the defaults below."""
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))

    def run(output_dir: Path, *flags: str, main=classify, **settings) -> None:
        defaults = {
            "model_name_or_path": inputs["model"],
            "dataset_name": inputs["texts"],
            "max_seq_length": 10,
            "activation": "relu",
            "sparsity_penalty": "square_hoyer",
            "sparsity_weight": 0.1,
            "num_train_epochs": 3,
            "learning_rate": 0.003,
            "per_device_train_batch_size": 16,
            "train_sampling_strategy": "group_by_length",
            "save_strategy": "no",
            "logging_steps": 5,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "expert_size": 8,
            "splitter": "coactivation",
            "router": "linear",
            "k": 0.5,
            "calibration_tokens": 900,
            "timed_batches": 0,
        }
        config = tmp_path_factory.mktemp("config") / "config.yaml"
        given = {**defaults, "output_dir": str(output_dir), **settings}
        config.write_text(yaml.safe_dump(given))
        budgets = [] if "budgets" in settings else ["--budgets", "0.25", "0.5"]
        patch.setattr(sys, "argv", ["recipe.py", "--config", str(config), *budgets, *flags])
        main()

    yield run
    patch.undo()


@pytest.fixture
def run_config(tmp_path, monkeypatch):
    """Run a task, or the `main` of a script, with the settings of a committed YAML file but for those given.

    None leaves a setting out.
    """
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def run(task, config: Path, **settings) -> None:
        given = yaml.safe_load(config.read_text()) | {
            "disable_tqdm": True,
            "report_to": "none",
            "use_cpu": True,
            "timed_batches": 0,
            **settings,
        }
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in given.items() if value is not None}))
        monkeypatch.setattr(sys, "argv", ["recipe", "--config", str(path)])
        task() if callable(task) else run_task(task)

    return run
