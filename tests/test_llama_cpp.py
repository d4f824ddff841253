"""llama.cpp itself computes what the MoEfied model does; where recipes/serving/README.md has installed it."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from gguf_files import IDS, both, logits, refusal
from test_exporting import LLAMA3

from moefy_hf import export
from moefy_hf.exporters.export import export_gguf

SERVING = Path(__file__).parents[1] / "recipes" / "serving"
ENGINE = pytest.mark.skipif(
    shutil.which("node") is None or not (SERVING / "node_modules" / "node-llama-cpp").exists(),
    reason="needs node-llama-cpp in recipes/serving",
)


def served(path, tmp_path, k: int | None = None) -> torch.Tensor:
    """(vocabulary,): what llama.cpp computes after `IDS`."""
    prompts, out = tmp_path / "prompts.json", tmp_path / "out.json"
    prompts.write_text(json.dumps({"prompts": [IDS.tolist()], "new_tokens": 1, "stop": []}))
    command = ["node", SERVING / "llama_cpp.mjs", path, prompts, out, "1", *([str(k)] if k else [])]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return torch.tensor(json.loads(out.read_text())["first_logits"][0])


def assert_served(model, path, tmp_path, k: int | None = None) -> None:
    ours = logits(model)[-1]
    assert (served(path, tmp_path, k) - ours).abs().max() < 1e-5 * ours.abs().max()


@ENGINE
@pytest.mark.parametrize(
    ("source", "changes"),
    [("llama", {"shared": 1}), ("llama", {"rope_parameters": LLAMA3}), ("qwen2", {}), ("qwen3", {})],
)
def test_llama_cpp_computes_the_same(source, changes, tmp_path):
    model, dense = both(tmp_path, source, 3, vocab_size=259, **changes)
    export(model, tmp_path / "moe.gguf", "gguf", dense=dense)
    assert_served(model, tmp_path / "moe.gguf", tmp_path)
    model.set_selection(k=5)
    assert_served(model, tmp_path / "moe.gguf", tmp_path, k=5 - changes.get("shared", 0))


@ENGINE
@pytest.mark.parametrize(
    ("source", "layers", "rope"), [("llama", 8, None), ("llama", 16, None), ("qwen3", 8, None), ("llama", 9, LLAMA3)]
)
def test_llama_cpp_has_room_for_the_largest_budget(source, layers, rope, tmp_path):
    changes = {"num_hidden_layers": layers, "intermediate_size": 256, "vocab_size": 259}
    model, dense = both(tmp_path, source, size=4, **changes, **({"rope_parameters": rope} if rope else {}))
    most = export_gguf(model, tmp_path / "moe.gguf", dense).most_experts
    assert 20 < most < 64
    model.set_selection(k=most)
    assert_served(model, tmp_path / "moe.gguf", tmp_path, k=most)
    model.set_selection(k=most + 1)
    assert f"room for {most} experts" in refusal(model, dense, tmp_path / "none")
