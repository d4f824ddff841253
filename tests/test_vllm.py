"""vLLM runs exported checkpoints, where MOEFY_VLLM names the Python of an environment that has it.

MOEFY_VLLM=vllm_env/bin/python pytest tests/test_vllm.py
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from batches import text_batches
from tiny import convert, tiny_model

from moefy_hf import export

PYTHON = os.environ.get("MOEFY_VLLM")
SCRIPT = Path(__file__).parents[1] / "recipes" / "serving" / "vllm_generate.py"
SIZES = {"hidden_size": 128, "num_attention_heads": 2, "head_dim": 64, "intermediate_size": 512}  # its heads are wide
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 16,
}
CASES = [
    ("llama-without-biases", "granitemoe", "vllm", 1e-5, {}),
    ("llama-without-biases", "granitemoe", "transformers", 1e-5, {"head_dim": 32}),
    ("llama-without-biases", "granitemoe", "vllm", 1e-5, {"shared_experts": 1}),
    ("llama-without-biases", "granitemoe", "vllm", 1e-5, {"rope_parameters": LLAMA3}),
    ("qwen2", "granitemoe", "transformers", 1e-5, {}),
    ("llama-without-biases", "mixtral", "vllm", 1e-3, {}),
    ("qwen3", "qwen3_moe", "vllm", 1e-3, {}),
]


@pytest.mark.skipif(PYTHON is None, reason="MOEFY_VLLM names no Python with vLLM")
@pytest.mark.parametrize(("source", "to", "implementation", "tolerance", "changes"), CASES)
def test_vllm_computes_the_same(source, to, implementation, tolerance, changes, tmp_path):
    shared = changes.get("shared_experts", 0)
    sizes = SIZES | {name: value for name, value in changes.items() if name != "shared_experts"}
    model = tiny_model(source, "AutoModelForCausalLM", num_hidden_layers=4, **sizes).eval()
    convert(model, 4, text_batches(8), expert_size=32, router="linear", shared_experts=shared)
    export(model, tmp_path / "out", to)
    ids = torch.randint(3, 99, (6, 12), generator=torch.Generator().manual_seed(1))
    asked = {"prompts": ids.tolist(), "new_tokens": 8, "stop": [2]}
    (tmp_path / "prompts.json").write_text(json.dumps(asked))
    arguments = [SCRIPT, tmp_path / "out", tmp_path / "prompts.json", tmp_path / "found.json", implementation]
    quiet = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "PYTHONPATH": ""}
    subprocess.run([str(PYTHON), *map(str, arguments)], check=True, env=os.environ | quiet)
    found = json.loads((tmp_path / "found.json").read_text())
    settings = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": 2, "pad_token_id": 0}
    with torch.no_grad():
        expected = model(input_ids=ids).logits[:, -1]
        generated = [
            model.generate(each, attention_mask=torch.ones_like(each), **settings)[0, 12:].tolist()
            for each in ids.split(1)
        ]
    assert (torch.tensor(found["first_logits"]) - expected).abs().max() <= tolerance * expected.abs().max()
    assert found["generations"] == generated
