"""What the files of a MoEfied checkpoint need.

Each modeling file imports this one first, before anything that an older transformers does not have.
"""

import transformers

TRANSFORMERS = (5, 17)


def check_version(version: str) -> None:
    """
    Raises:
        ImportError: this transformers is too old for MoEfied checkpoints.
    """
    if tuple(int(part) for part in version.split(".")[:2]) < TRANSFORMERS:
        needed = ".".join(map(str, TRANSFORMERS))
        raise ImportError(
            f"MoEfied checkpoints need transformers {needed} or newer, and this is {version}: pip install "
            f"'transformers>={needed}'; without trust_remote_code=True transformers loads a dense model"
        )


check_version(transformers.__version__)
