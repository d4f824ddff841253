"""Starts several processes of a script beside the tests."""

import os
import socket
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def torchrun(
    script: str, *words: str, processes: int = 2, timeout: float = 300, **environment: str
) -> subprocess.CompletedProcess:
    """Run a script of this folder, with one thread in each process.

    Args:
        script: its name.
        words: its arguments.
        processes: how many.
        timeout: seconds.
        environment: further variables.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = [str(HERE), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **environment}
    run = ["torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}", str(HERE / script)]
    return subprocess.run(
        [sys.executable, "-m", *run, *words], capture_output=True, text=True, env=environment, timeout=timeout
    )
