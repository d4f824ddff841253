"""`moefy kernels`: which implementations can run here, and the file that the C++ kernel is compiled into."""

import time
from typing import Any

from moefy_ffn import ACTIVATIONS, BuildError, build

from ..errors import MoefyError
from .backends import BACKENDS

INSTRUCTION_SETS = ("avx", "amx", "fma", "sve", "asimd", "bf16", "i8mm")  # how those begin that matter here


def kernels_info() -> dict[str, Any]:
    """Return which implementations can run here, and the facts of the C++ kernel; nothing is compiled."""
    reasons = {"masked": None} | {name: backend.unavailable() for name, backend in BACKENDS.items()}
    info: dict[str, Any] = {
        "implementations": {name: {"runs": why is None, "reason": why} for name, why in reasons.items()},
        "compiler": None,
        "version": None,
        "flags": list(build.FLAGS),
        "processor": processor_flags(),
        "activations": list(ACTIVATIONS),
        "cache": str(build.cache_directory()),
        "file": None,
        "bytes": None,  # of the file, once it is compiled
    }
    if reasons["cpu"] is None:
        path = build.compiled()
        size = path.stat().st_size if path.exists() else None
        info |= {"compiler": build.compiler(), "version": build.compiler_version(), "file": str(path), "bytes": size}
    return info


def instruction_sets() -> list[str]:
    """Return the processor's instruction sets that matter for matrices: AVX2, AVX-512, VNNI, bf16, AMX, NEON, SVE.

    Names are those of the operating system, which on ARM calls NEON asimd. None are known outside of Linux.
    """
    return [name for name in processor_flags() if name.startswith(INSTRUCTION_SETS)]


def processor_flags() -> list[str]:
    """Return all that the operating system says the processor knows; nothing outside of Linux."""
    return build.processor().partition(":")[2].split()


def kernels_build(force: bool = False) -> dict[str, Any]:
    """Compile now what else the first use would; return the file, its size and what that took.

    Args:
        force: also where it is compiled already.

    Raises:
        MoefyError: it cannot be compiled here.
    """
    started = time.perf_counter()
    try:
        path = build.compiled()
        fresh = force or not path.exists()
        if fresh:
            build.compile_(path)
        build.library()  # loads
    except BuildError as error:
        raise MoefyError(str(error)) from error
    seconds = round(time.perf_counter() - started, 2) if fresh else 0.0
    return {"file": str(path), "bytes": path.stat().st_size, "compiled_now": fresh, "seconds": seconds}


def show_info(info: dict[str, Any]) -> str:
    """Return what `kernels_info` says, as Markdown."""
    lines = ["| implementation | runs here |", "|---|---|"]
    lines += [f"| {name} | {status['reason'] or 'yes'} |" for name, status in info["implementations"].items()]
    size = "not compiled yet" if info["bytes"] is None else f"{info['bytes']:,} bytes"
    facts = {
        "compiler": info["compiler"] and f"{info['compiler']} ({info['version']})",
        "flags": " ".join(info["flags"]),
        "instruction sets": " ".join(instruction_sets()),
        "activations": ", ".join(info["activations"]),
        "cache": info["cache"],
        "file": info["file"] and f"{info['file']} ({size})",
    }
    return "\n".join([*lines, "", *(f"{name}: {value or 'none'}" for name, value in facts.items())])


def show_build(built: dict[str, Any]) -> str:
    """Return what `kernels_build` did, in words."""
    what = f"compiled in {built['seconds']} s" if built["compiled_now"] else "compiled already (--force does it again)"
    return f"{built['file']}, {built['bytes']:,} bytes: {what}"
