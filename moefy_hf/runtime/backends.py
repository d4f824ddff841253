"""The registry of backends, beside masked execution, and which of them "auto" is."""

from moefy_ffn import BuildError
from transformers.utils import logging

from .backend_base import Backend
from .cpu_kernel import CpuKernel
from .torch_rows import TorchRows
from .triton_kernel import TRITON_EXTRA, TritonKernel

logger = logging.get_logger("moefy_hf")

BACKENDS: dict[str, type[Backend]] = {backend.name: backend for backend in (TorchRows, CpuKernel, TritonKernel)}


def best_for(device: str) -> str:
    """Return what "auto" is on a type of device: a name of `BACKENDS`, or "masked"."""
    if device == "cuda":
        if TritonKernel.installed():
            return "triton"
        logger.warning_once(f"FFNs run masked: there is no Triton ({TRITON_EXTRA})")
        return "masked"
    try:
        CpuKernel.require()
    except BuildError as error:
        logger.warning_once(f"experts run by torch, slower than compiled: {error}")
        return "torch"
    return "cpu"
