"""The README: its figures are those of committed files, its example runs, and its commands are those of CI."""

import re
import sys
from pathlib import Path

import pytest
import readme_blocks
import yaml
from documents import fenced
from tiny import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", readme_blocks.pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_generated_blocks_are_those_of_the_committed_figures_and_the_code(page):
    """python tests/readme_blocks.py"""
    text = page.read_text(encoding="utf-8")
    assert text == readme_blocks.rewritten(text)
    assert text.count("<!-- generated: ") == len(readme_blocks.BLOCK.findall(text)) == text.count("<!-- end -->")


def test_a_changed_figure_is_noticed():
    text = "<!-- generated: headline -->\n\n- **101% of the accuracy**\n\n<!-- end -->\n"
    assert readme_blocks.rewritten(text) != text


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


@pytest.fixture
def hub_in_a_folder(tmp_path, monkeypatch):
    """What the example names on the Hub, as folders of the working directory, where transformers looks first."""
    model = tiny_model("opt", "AutoModelForCausalLM", ffn_dim=64, max_position_embeddings=256)
    model.save_pretrained(tmp_path / "facebook" / "opt-125m")
    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")
    tokenizer.save_pretrained(tmp_path / "facebook" / "opt-125m")
    data = tmp_path / "Salesforce" / "wikitext"
    data.mkdir(parents=True)
    (data / "train.txt").write_text("\n".join(" ".join("the quick brown fox"[i % 9 :]) * 20 for i in range(400)))
    about = {
        "configs": [{"config_name": "wikitext-2-raw-v1", "data_files": [{"split": "train", "path": "train.txt"}]}]
    }
    (data / "README.md").write_text(f"---\n{yaml.safe_dump(about)}---\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_example_runs_as_it_is_written(hub_in_a_folder, capsys):
    (code,) = fenced(README, "python")
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)  # noqa: S102
    assert "perplexity" in capsys.readouterr().out
    assert (hub_in_a_folder / "opt-125m-moe" / "config.json").exists()
    assert type(names["moe"]).__name__ == "MoefiedOPTForCausalLM" and names["moe"].config.moefication
    assert type(names["dense"]).__name__ == "OPTForCausalLM"
    assert [site.act.k for site in names["moe"].moe_sites()] == [site.act.k for site in names["model"].moe_sites()]


def test_the_tests_command_is_what_ci_runs():
    (command,) = [block for block in fenced(README, "bash") if "pytest" in block]
    steps = [step.strip() for step in command.split("&&")]
    script = [
        line.replace("pip install -q", "pip install") for line in (ROOT / ".ci" / "run").read_text().splitlines()
    ]
    ours = [step for step in steps if step.startswith(("pip", "pytest"))]
    assert len(ours) == 3 and [line for line in script if line in ours] == ours


def test_the_recipe_command_names_files_that_exist():
    (command,) = [block for block in fenced(README, "bash") if "accelerate launch" in block]
    named = re.findall(r"recipes/\S+", command)
    assert len(named) == 2 and all((ROOT / path).exists() for path in named)


@pytest.mark.skipif(sys.platform == "win32", reason="links of the file system")
@pytest.mark.parametrize("path", ["README.md", "CONTRIBUTING.md", "recipes/serving/README.md"])
def test_links_lead_somewhere(path):
    """Those of docs/ are checked by `mkdocs build --strict`."""
    links = re.findall(r"\]\(([^):]+)\)", (ROOT / path).read_text(encoding="utf-8"))
    assert links
    for link in links:
        file, _, section = link.partition("#")
        target = (ROOT / path).parent / file if file else ROOT / path
        assert target.exists() and (not section or section in sections(target)), link


def sections(path: Path) -> list[str]:
    """Return what links call the headings of a Markdown file."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
