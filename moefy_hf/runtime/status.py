"""`moefy kernels`: which implementations can run here, and the file that the C++ kernel is compiled into."""

import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from moefy_ffn import ACTIVATIONS, BuildError, build

from .execution import TRITON_EXTRA


def no_reason() -> None:
    """Plain torch runs everywhere."""


def missing_compiler() -> str | None:
    try:
        build.compiled()
    except (BuildError, OSError) as error:
        return str(error)
    return None


def missing_gpu() -> str | None:
    if find_spec("triton") is None:
        return f"there is no Triton: {TRITON_EXTRA}"
    return None if torch.cuda.is_available() else "there is no GPU"


# name in set_moe_implementation -> () -> why it cannot run here, or None
REASONS: dict[str, Callable[[], str | None]] = {
    "masked": no_reason,
    "torch": no_reason,
    "cpu": missing_compiler,
    "triton": missing_gpu,
}


def kernels_info() -> dict[str, Any]:
    """Nothing is compiled."""
    reasons = {name: reason() for name, reason in REASONS.items()}
    found: dict[str, Any] = {
        "implementations": {name: {"runs": why is None, "reason": why} for name, why in reasons.items()},
        "compiler": None,
        "version": None,
        "flags": list(build.FLAGS),
        "processor": build.processor().partition(":")[2].split(),
        "activations": list(ACTIVATIONS),
        "cache": str(build.cache_directory()),
        "file": None,
        "bytes": None,  # of the file, once it is compiled
    }
    if reasons["cpu"] is None:
        path = build.compiled()
        size = path.stat().st_size if path.exists() else None
        found |= {"compiler": build.compiler(), "version": build.compiler_version(), "file": str(path), "bytes": size}
    return found


def kernels_build(force: bool = False) -> dict[str, Any]:
    """Compile now what else the first use would.

    Args:
        force: also where it is compiled already.

    Raises:
        ValueError: it cannot be compiled here.
    """
    started = time.perf_counter()
    try:
        path = build.compiled()
        fresh = force or not path.exists()
        if fresh:
            build.compile_(path)
        build.library()  # loads
    except BuildError as error:
        raise ValueError(str(error)) from error
    seconds = round(time.perf_counter() - started, 2) if fresh else 0.0
    return {"file": str(path), "bytes": path.stat().st_size, "compiled_now": fresh, "seconds": seconds}


def show_info(found: dict[str, Any]) -> str:
    lines = ["| implementation | runs here |", "|---|---|"]
    lines += [f"| {name} | {each['reason'] or 'yes'} |" for name, each in found["implementations"].items()]
    size = "not compiled yet" if found["bytes"] is None else f"{found['bytes']:,} bytes"
    facts = {
        "compiler": found["compiler"] and f"{found['compiler']} ({found['version']})",
        "flags": " ".join(found["flags"]),
        "instruction sets": " ".join(
            name for name in found["processor"] if name.startswith(("avx", "amx", "fma", "sve"))
        ),
        "activations": ", ".join(found["activations"]),
        "cache": found["cache"],
        "file": found["file"] and f"{found['file']} ({size})",
    }
    return "\n".join([*lines, "", *(f"{name}: {value or 'none'}" for name, value in facts.items())])


def show_build(found: dict[str, Any]) -> str:
    what = f"compiled in {found['seconds']} s" if found["compiled_now"] else "compiled already (--force does it again)"
    return f"{found['file']}, {found['bytes']:,} bytes: {what}"
