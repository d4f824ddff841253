"""The generated blocks of README.md and docs/: what stands between `<!-- generated: NAME -->` and `<!-- end -->`.

`python tests/readme_blocks.py` writes them anew, from committed figures and from the code. A test compares them whole.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import figure_blocks
import reference_blocks
import scale_blocks
import speed_blocks

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(<!-- generated: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
BLOCKS: dict[str, Callable[..., str]] = {
    **figure_blocks.BLOCKS,
    **speed_blocks.BLOCKS,
    **scale_blocks.BLOCKS,
    **reference_blocks.BLOCKS,
}


def pages() -> list[Path]:
    """Return the READMEs and every page of docs/."""
    return [ROOT / "README.md", ROOT / "recipes" / "serving" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def block(words: str) -> str:
    """Return the text of a block: `words` is its name, and the arguments of its function."""
    name, *arguments = words.split()
    return BLOCKS[name](*arguments).strip()


def rewritten(text: str) -> str:
    """Return a page with all of its generated blocks as they are to be."""
    return BLOCK.sub(lambda found: f"{found[1]}\n{block(found[2])}\n\n{found[3]}", text)


def main() -> None:
    for page in pages():
        text = page.read_text(encoding="utf-8")
        new = rewritten(text)
        if new != text:
            page.write_text(new, encoding="utf-8")
            print(page.relative_to(ROOT), file=sys.stderr)


if __name__ == "__main__":
    main()
