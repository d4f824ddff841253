"""Commands in several processes, as torchrun, `accelerate launch` and mpirun start them."""

import atexit
import os
import time
from typing import TYPE_CHECKING

from ..errors import MoefyError

if TYPE_CHECKING:
    from ..measure.processes import Processes

IN_SEVERAL = ("convert", "sweep", "train")  # commands that share their work
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # what launchers say


def launched() -> int:
    """Return how many processes a launcher started for this command."""
    return max(int(os.environ.get(name) or 1) for name in SIZES)


def check_launched(command: str) -> None:
    """Check that a command can run in as many processes as were started.

    Raises:
        MoefyError: it runs in one.
    """
    if launched() > 1 and command not in IN_SEVERAL:
        raise MoefyError(
            f"{launched()} processes were launched, and this command runs in one; those that share their work are "
            f"{', '.join(IN_SEVERAL)}"
        )


def joined(*data: str | None) -> "Processes":
    """Connect the processes that a launcher started; all but the first are quiet from then on.

    Args:
        data: what --data and its like name.

    Returns:
        this process alone, where it was not launched with others.

    Raises:
        MoefyError: data come from standard input, which can be read once.
    """
    from ..measure.processes import ALONE, LONGEST, together

    if launched() == 1:
        return ALONE
    import torch
    from accelerate import PartialState

    if "-" in data:
        raise MoefyError(f"{launched()} processes cannot all read standard input: give a file")
    state = PartialState(cpu=True, timeout=LONGEST)  # cpu: of what is exchanged; models go where they go alone
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(state.local_process_index % torch.accelerator.device_count())
    processes = together()
    atexit.register(time.sleep, 1)  # gloo's threads drop their last tensors with Python's lock, or abort
    if not processes.first:
        be_quiet()
    return processes


def be_quiet() -> None:
    """Show no warnings and no progress bars: the first process shows the same."""
    import logging
    import warnings

    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging as of_transformers

    warnings.simplefilter("ignore")
    logging.getLogger("moefy_hf").setLevel(logging.ERROR)
    of_transformers.set_verbosity_error()
    of_transformers.disable_progress_bar()
    disable_progress_bars()
