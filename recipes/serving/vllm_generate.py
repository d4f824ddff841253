#!/usr/bin/env python
"""Generate with vLLM what recipes/figures/check_export.py compares. Runs in vLLM's own environment, without moefy_hf.

python recipes/serving/vllm_generate.py smol-granitemoe prompts.json generations.json
python recipes/serving/vllm_generate.py smol-granitemoe prompts.json generations.json transformers   # its backend
"""

import json
import sys
from pathlib import Path

import vllm


def main() -> None:
    """Read prompts of token ids, and write greedy generations and the logits of each one's first step."""
    checkpoint, prompts, output, *implementation = sys.argv[1:]
    asked = json.loads(Path(prompts).read_text(encoding="utf-8"))
    engine = vllm.LLM(
        checkpoint,
        dtype="float32",
        model_impl=implementation[0] if implementation else "vllm",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=max(map(len, asked["prompts"])) + asked["new_tokens"],
        max_num_seqs=8,
        max_logprobs=-1,
        logprobs_mode="raw_logits",
    )
    settings = {"temperature": 0, "detokenize": False, "stop_token_ids": asked["stop"]}
    inputs = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
    steps = engine.generate(inputs, vllm.SamplingParams(max_tokens=1, logprobs=-1, **settings))
    whole = engine.generate(inputs, vllm.SamplingParams(max_tokens=asked["new_tokens"], **settings))
    first = [each.outputs[0].logprobs[0] for each in steps]
    found = {
        "engine": f"vLLM {vllm.__version__} on a CPU" + "".join(f", --model-impl {name}" for name in implementation),
        "generations": [list(each.outputs[0].token_ids) for each in whole],
        "first_logits": [[logits[token].logprob for token in range(len(logits))] for logits in first],
    }
    Path(output).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
