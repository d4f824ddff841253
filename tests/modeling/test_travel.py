"""What is saved works where this package is not installed."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import convert, distance, run, tiny_inputs, tiny_model

from moefy_hf.modeling import moefied

FILES = sorted(path for path in Path(moefied.__file__).parent.iterdir() if path.name != "__pycache__")
HEADS = {
    "bert": "AutoModelForSequenceClassification",
    "t5": "AutoModelForSeq2SeqLM",
    "llama": "AutoModelForCausalLM",
    "vit": "AutoModelForImageClassification",
}

ELSEWHERE = """
import sys
sys.modules["moefy_hf"] = None  # importing it fails
import torch
import transformers

root = sys.argv[1]
for name, head in zip(sys.argv[2::2], sys.argv[3::2]):
    auto = getattr(transformers, head)
    model = auto.from_pretrained(f"{root}/{name}", trust_remote_code=True).eval()
    assert type(model).__name__.startswith("Moefied"), type(model)
    inputs = torch.load(f"{root}/{name}/inputs.pt")
    with torch.no_grad():
        sparse = model(**inputs).logits
        model.save_pretrained(f"{root}/{name}/again")
        again = auto.from_pretrained(f"{root}/{name}/again", trust_remote_code=True).eval()
        assert type(again).__name__ == type(model).__name__ and torch.equal(again(**inputs).logits, sparse)
        model.set_selection(k=1.0)
        full = model(**inputs).logits
    torch.save([sparse, full], f"{root}/{name}/outputs.pt")
"""


def test_loads_without_the_package(tmp_path):
    expected = {}
    for name, head in HEADS.items():
        model, inputs = tiny_model(name, head), tiny_inputs(name, head)
        dense = model(**inputs).logits
        convert(model, k=2)
        model.save_pretrained(tmp_path / name)
        torch.save(inputs, tmp_path / name / "inputs.pt")
        expected[name] = (run(model, inputs), dense.detach())
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(tmp_path), *(word for pair in HEADS.items() for word in pair)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    for name, (sparse, dense) in expected.items():
        found = torch.load(tmp_path / name / "outputs.pt")
        assert torch.equal(found[0], sparse[0]), name
        assert distance([found[1]], [dense]) < 1e-5 < distance([found[0]], [dense])


def test_the_folder_is_flat():
    assert all(path.suffix == ".py" for path in FILES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_imports_are_ones_that_travel(path):
    """transformers finds relative imports by regular expression, copies the files flat, and checks absolute ones."""
    source, siblings = path.read_text(), {path.stem for path in FILES}
    relative = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module and "." not in node.module, f"line {node.lineno}: not a sibling"
            assert node.module in siblings, f"line {node.lineno}: no file {node.module}.py"
            relative.add(node.module)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for name in names:
                root = name.partition(".")[0]
                assert root in {"torch", "transformers"} or root in sys.stdlib_module_names, (
                    f"line {node.lineno}: {name}"
                )
    # what transformers' regular expressions see, in docstrings and comments too
    seen = re.findall(r"^\s*import\s+\.(\S+)\s*$", source, flags=re.MULTILINE)
    seen += re.findall(r"^\s*from\s+\.(\S+)\s+import", source, flags=re.MULTILINE)
    assert set(seen) == relative
