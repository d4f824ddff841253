"""Numbers as the command line takes them."""

import argparse


def share_or_count(text: str) -> int | float:
    try:
        return float(text) if "." in text or "e" in text else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a share like 0.2 or a number of experts, got {text!r}") from None


def setting(text: str) -> tuple[str, int | float]:
    """NAME=NUMBER"""
    name, _, value = text.partition("=")
    try:
        return name, int(value) if value.isdigit() else float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a setting and a number like rank=64 or inputs=0.4, got {text!r}") from None


def positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1, got {text!r}")
    return number
