# /// script
# requires-python = ">=3.10"
# dependencies = ["moefy-hf[plots]"]
# ///
"""Train or fine-tune an encoder-decoder on pairs of texts, MoEfy it, and measure quality and time against compute.

    accelerate launch recipes/moefy_seq2seq.py --config recipes/configs/t5_r8/moefication.yaml

This is `moefy train seq2seq`, as a file that runs wherever the package can be installed.
"""

from moefy_hf.recipes.tasks import main

if __name__ == "__main__":
    main("seq2seq")
