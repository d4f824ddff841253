"""Reads code out of Markdown pages."""

import re


def fenced(text: str, language: str) -> list[str]:
    """Return the code blocks of a page that are marked with a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
