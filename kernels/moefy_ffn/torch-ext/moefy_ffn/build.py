"""Compile ffn.cpp with the system's compiler, once per machine: plain C++ without torch's headers takes seconds."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("ffn.cpp")
HEADERS = sorted(SOURCE.parent.glob("*.h"))
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-fopenmp")


class BuildError(RuntimeError):
    """Why there is no compiled kernel here."""


def compiler() -> str:
    """
    Raises:
        BuildError: there is none.
    """
    name = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not name:
        raise BuildError("there is no C++ compiler (g++ or clang++; CXX names another)")
    return name


def cache_directory() -> Path:
    """$MOEFY_KERNELS, else a folder of the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MOEFY_KERNELS") or Path(base, "moefy_ffn"))


def key() -> str:
    """What the compiled file depends on: the sources, the compiler and its flags, and this processor."""
    version = subprocess.run([compiler(), "--version"], capture_output=True, text=True).stdout
    parts = (*(path.read_text() for path in (SOURCE, *HEADERS)), version, *FLAGS, processor())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def processor() -> str:
    """Its instruction sets: code for another processor would be an illegal instruction here."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()}"


def compiler_version() -> str:
    """The first line that the compiler says of itself.

    Raises:
        BuildError: there is no compiler.
    """
    said = subprocess.run([compiler(), "--version"], capture_output=True, text=True).stdout
    return next(iter(said.splitlines()), "unknown")


def compiled() -> Path:
    """Where the compiled kernel is, or would be.

    Raises:
        BuildError: there is no compiler.
    """
    return cache_directory() / f"ffn-{key()}.so"


def compile_(path: Path) -> None:
    """
    Raises:
        BuildError: there is no compiler, or it fails; the first line of what it says is in the message.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"[moefy_ffn] compiling {SOURCE.name}, once, into {path}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # renamed when whole: others may be compiling, too
        made = Path(folder, "ffn.so")
        # CXX may name a C compiler (peft's BOFT sets it to gcc), which does not link what C++ needs by itself
        runtime = [] if "++" in Path(compiler()).name else ["-lstdc++"]
        command = [compiler(), *FLAGS, str(SOURCE), "-o", str(made), *runtime]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise BuildError(f"{compiler()} failed: {next(iter(done.stderr.splitlines()), 'no message')}")
        made.rename(path)


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernel, compiled now if it never was.

    Raises:
        BuildError: see `compile_`; or the compiler that CXX names, or a cache that can be written, is not there.
    """
    try:
        path = compiled()
        if not path.exists():
            compile_(path)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"the kernel cannot be compiled or loaded here: {error}") from error
