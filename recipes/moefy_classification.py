# /// script
# requires-python = ">=3.10"
# dependencies = ["moefy-hf[plots]"]
# ///
"""Fine-tune an encoder on labelled text, MoEfy it, and measure quality and time against compute.

    accelerate launch recipes/moefy_classification.py --config recipes/configs/quickstart.yaml

This is `moefy train classification`, as a file that runs wherever the package can be installed.
"""

from moefy_hf.recipes.tasks import main

if __name__ == "__main__":
    main("classification")
