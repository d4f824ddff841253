# /// script
# requires-python = ">=3.10"
# dependencies = ["moefy-hf[plots]"]
# ///
"""Fine-tune an encoder to find answers in texts, MoEfy it, and measure quality and time against compute.

    accelerate launch recipes/moefy_question_answering.py --config recipes/configs/minilm_cloze/moefication.yaml

This is `moefy train question_answering`, as a file that runs wherever the package can be installed.
"""

from moefy_hf.recipes.tasks import main

if __name__ == "__main__":
    main("question_answering")
