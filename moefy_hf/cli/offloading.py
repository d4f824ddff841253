"""Whether the weights of a model stay on disk, for commands that can do without them in memory."""

import argparse
import os
from argparse import Namespace

import psutil
import torch

from ..loading import checkpoint_class, read_config
from .common import computes_bfloat16, logger

OFFLOAD = ("auto", "yes", "no")
FITS = 0.8  # of the free memory, which weights may take


def add_offload(command: argparse.ArgumentParser) -> None:
    """Give a command the argument that says where weights are kept."""
    help = "leave weights on disk, and read each when it is used (default: auto, where they do not fit in memory)"
    command.add_argument("--offload", choices=OFFLOAD, default="auto", help=help)


def wants_offload(args: Namespace) -> bool:
    """Return whether the weights of MODEL are to stay on disk; say why, if that was not asked for."""
    if args.offload != "auto":
        return bool(args.offload == "yes")
    if torch.accelerator.is_available():  # into whose memory they go
        return False
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # each has a copy
    needed, free = processes * size_of(args), psutil.virtual_memory().available
    if needed < FITS * free:
        return False
    logger.warning(
        f"weights stay on disk, and are read when they are used: they take {needed / 1e9:.1f} GB, and "
        f"{free / 1e9:.1f} GB of memory are free (--offload no loads them all the same)"
    )
    return True


def size_of(args: Namespace) -> int:
    """Return the bytes of MODEL's weights, in the type that the CPU computes in."""
    config = read_config(args.model, args.revision, trust_remote_code=args.trust_remote_code)
    cls = checkpoint_class(config, args.head, trust_remote_code=args.trust_remote_code, revision=args.revision)
    dtype = (config.dtype or torch.float32) if args.dtype == "auto" else getattr(torch, args.dtype)
    if args.dtype == "auto" and dtype == torch.bfloat16 and not computes_bfloat16():
        dtype = torch.float32
    with torch.device("meta"):
        return sum(each.numel() for each in cls(config).parameters()) * dtype.itemsize
