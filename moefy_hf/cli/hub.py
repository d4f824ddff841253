"""`moefy card` and `moefy push`: a MoEfied checkpoint on the Hub."""

import argparse
from argparse import Namespace
from typing import Any

from huggingface_hub import HfApi

from ..hub.card import is_rendered, write_card
from ..hub.facts import add_facts
from ..hub.push import add_license, push_to_hub
from .common import checkpoint_folder, of_model


def add_card(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `moefy card`."""
    of_model(command, card, lambda result: result["card"])
    command.add_argument("--repo_id", help="where it is going to be on the Hub")
    command.add_argument("--base_model", help="Hub id of the dense model, where the conversion did not see it")
    command.add_argument("--license", help="of the base model, where the Hub does not know it")
    command.add_argument("--overwrite", action="store_true", help="replace the README.md that is there")


def add_push(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `moefy push`."""
    of_model(command, push, lambda result: result["url"])
    command.add_argument("repo_id", metavar="REPO", help="owner/name; created where it does not exist")
    command.add_argument("--private", action="store_true", default=None, help="if the repository is new")
    command.add_argument("--branch", help="push there instead of main; created where it does not exist")
    command.add_argument("--create_pr", action="store_true", help="open a pull request")
    command.add_argument("--overwrite", action="store_true", help="also over something that is not MoEfied")
    command.add_argument("--message", default="MoEfied checkpoint", help="of the commit")


def card(args: Namespace) -> dict[str, Any]:
    """Write the card of MODEL's folder; return its path.

    Raises:
        FileExistsError: somebody has written in the card that is there, and not --overwrite.
    """
    folder = checkpoint_folder(args)
    readme = folder / "README.md"
    if readme.exists() and not args.overwrite and not is_rendered(readme.read_text(encoding="utf-8")):
        raise FileExistsError(f"{readme} exists, and somebody has written in it: move it away, or --overwrite it")
    add_facts(folder, base_model=args.base_model, license=args.license)
    add_license(folder, HfApi())
    return {"card": str(write_card(folder, args.repo_id, overwrite=True))}


def push(args: Namespace) -> dict[str, Any]:
    """Upload MODEL's folder; return the URL and the commit.

    Raises:
        PushError: see `push_to_hub`.
    """
    commit = push_to_hub(
        checkpoint_folder(args),
        args.repo_id,
        private=args.private,
        branch=args.branch,
        create_pr=args.create_pr,
        overwrite=args.overwrite,
        message=args.message,
    )
    return {"url": commit.pr_url or commit.commit_url, "commit": commit.oid}
