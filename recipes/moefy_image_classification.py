# /// script
# requires-python = ">=3.10"
# dependencies = ["moefy-hf[plots,images]"]
# ///
"""Train or fine-tune a vision Transformer on labelled images, MoEfy it, and measure quality and time against compute.

    accelerate launch recipes/moefy_image_classification.py --config recipes/configs/vit_fashion/moefication.yaml

This is `moefy train image_classification`, as a file that runs wherever the package can be installed.
"""

from moefy_hf.recipes.tasks import main

if __name__ == "__main__":
    main("image_classification")
