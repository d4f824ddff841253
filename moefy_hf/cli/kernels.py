"""`moefy kernels`: the compiled kernel of this machine."""

import argparse

from ..runtime.status import kernels_build, kernels_info, show_build, show_info


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `moefy kernels`, which has two words."""
    words = command.add_subparsers(dest="word", required=True, metavar="info|build")
    info = words.add_parser("info", help="which implementations can run here, and where the compiled kernel is")
    info.set_defaults(run=lambda args: kernels_info(), show=show_info)
    build = words.add_parser("build", help="compile the C++ kernel now instead of on first use")
    build.add_argument("--force", action="store_true", help="although it is compiled")
    build.set_defaults(run=lambda args: kernels_build(args.force), show=show_build)
    for word in (info, build):
        word.add_argument("--json", action="store_true", help="print JSON")
