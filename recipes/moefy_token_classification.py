# /// script
# requires-python = ">=3.10"
# dependencies = ["moefy-hf[plots,tokens]"]
# ///
"""Fine-tune an encoder to tag words, MoEfy it, and measure quality and time against compute.

    accelerate launch recipes/moefy_token_classification.py --config recipes/configs/minilm_oanc/moefication.yaml

This is `moefy train token_classification`, as a file that runs wherever the package can be installed.
"""

from moefy_hf.recipes.tasks import main

if __name__ == "__main__":
    main("token_classification")
