"""Run by accelerate in two processes: all that tests/test_several_processes.py compares with one."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from ddp_run import TRAINERS, results  # noqa: E402
from sharded_run import results as sharded_results  # noqa: E402


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    found = {name: results(name, folder, 4) for name in TRAINERS}
    torch.save(found | {"sharded": sharded_results(folder)}, folder / f"{os.environ['RANK']}.pt")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may hold tensors still


if __name__ == "__main__":
    main()
