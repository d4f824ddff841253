# /// script
# requires-python = ">=3.10"
# dependencies = ["moefy-hf[plots,gguf]"]
# ///
"""MoEfy a pretrained language model without training, and measure perplexity and time against compute.

    accelerate launch recipes/moefy_causal_lm.py --config recipes/configs/smollm2/moefication.yaml

This is `moefy train causal_lm`, as a file that runs wherever the package can be installed.
"""

from moefy_hf.recipes.tasks import main

if __name__ == "__main__":
    main("causal_lm")
