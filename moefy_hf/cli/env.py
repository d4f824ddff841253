"""`moefy env`: what a bug report needs to know of this machine."""

import argparse
import platform
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import moefy_hf

from ..io import markdown

REQUIRED = ("torch", "transformers", "accelerate", "peft", "datasets", "huggingface_hub", "safetensors")
OPTIONAL = (
    *("triton", "onnxruntime", "onnx", "onnxscript", "llama-cpp-python", "gguf", "torchao", "bitsandbytes", "vllm"),
    *("lm-eval", "evaluate", "seqeval", "trl", "sentence-transformers", "setfit", "optimum-onnx"),
    *("trackio", "tensorboard", "wandb", "mlflow", "pymetis", "matplotlib", "plotly"),
)


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `moefy env`."""
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=lambda args: environment(), show=show_environment)


def environment() -> dict[str, Any]:
    """Return versions, and the facts of processor, compiled kernel and accelerator; nothing is compiled.

    Whatever is broken here has {"error": what it says} in place of its facts: that is what the report is about.
    """
    return {
        "versions": {"moefy-hf": moefy_hf.__version__, "python": sys.version.split()[0]}
        | {name: version_of(name) for name in (*REQUIRED, *OPTIONAL)},
        "installed": str(Path(moefy_hf.__file__).parent),
        "system": platform.platform(),
        "processor": facts_or_error(processor),
        "kernels": facts_or_error(kernels),
        "accelerator": facts_or_error(accelerator),
    }


def version_of(package: str) -> str | None:
    """Return the version of an installed package; None where it is not installed."""
    try:
        return metadata.version(package)
    except Exception:  # also where its metadata are damaged
        return None


def facts_or_error(part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what a function returns, or {"error": message} where it fails in whatever way."""
    try:
        return part()
    except Exception as error:
        return {"error": " ".join(f"{type(error).__name__}: {error}".split())}


def processor() -> dict[str, Any]:
    """Return the processor's name and instruction sets, and how many threads torch uses."""
    import torch  # here and below: this command must run where torch does not

    from ..bench.timing import hardware
    from ..runtime.status import instruction_sets

    return {"name": hardware(), "instruction_sets": instruction_sets(), "threads": torch.get_num_threads()}


def kernels() -> dict[str, Any]:
    """Return what `moefy kernels info` says, and why the compiled kernel does not load, where it does not."""
    from ..runtime.cpu_kernel import CpuKernel
    from ..runtime.status import kernels_info

    info: dict[str, Any] = kernels_info() | {"load_error": None}
    if info["bytes"] is not None:  # otherwise loading would compile it
        try:
            CpuKernel.require()
        except Exception as error:
            info["load_error"] = f"{error}"
    return info


def accelerator() -> dict[str, Any]:
    """Return name and number of the accelerators that torch uses; none on a machine that has a processor only."""
    import torch

    if not torch.accelerator.is_available():
        return {"count": 0}
    kind = torch.accelerator.current_accelerator()
    name = torch.cuda.get_device_name() if kind is not None and kind.type == "cuda" else str(kind)
    runtime = torch.version.cuda or torch.version.hip
    return {"name": name, "count": torch.accelerator.device_count(), "runtime": runtime}


def show_environment(found: dict[str, Any]) -> str:
    """Return what `environment` says, as a Markdown table to paste."""
    rows = {name: version or "not installed" for name, version in found["versions"].items()}
    rows["moefy-hf"] += f" in {found['installed']}"
    rows["system"] = found["system"]
    for part, lines in (("processor", processor_rows), ("kernels", kernel_rows), ("accelerator", accelerator_rows)):
        facts = found[part]
        rows |= {part: f"fails: {facts['error']}"} if "error" in facts else lines(facts)
    return markdown([{"what": what, "here": f"{value}".replace("|", "\\|")} for what, value in rows.items()])


def processor_rows(facts: dict[str, Any]) -> dict[str, Any]:
    """Return the rows of the printed table that are about the processor."""
    sets = " ".join(facts["instruction_sets"]) or "unknown"
    return {"processor": facts["name"], "instruction sets": sets, "threads": facts["threads"]}


def kernel_rows(info: dict[str, Any]) -> dict[str, Any]:
    """Return the rows of the printed table that are about implementations."""
    rows = {f"implementation {name}": each["reason"] or "yes" for name, each in info["implementations"].items()}
    if info["compiler"] is None:
        return rows | {"compiler": "none"}
    loads = f"does not load: {info['load_error']}" if info["load_error"] else "loads"
    kernel = "not compiled yet: moefy kernels build" if info["bytes"] is None else f"{info['file']}, {loads}"
    return rows | {"compiler": f"{info['compiler']} ({info['version']})", "compiled kernel": kernel}


def accelerator_rows(facts: dict[str, Any]) -> dict[str, Any]:
    """Return the row of the printed table that is about accelerators."""
    if not facts["count"]:
        return {"accelerator": "none"}
    runtime = f", runtime {facts['runtime']}" if facts["runtime"] else ""
    return {"accelerator": f"{facts['count']} x {facts['name']}{runtime}"}
