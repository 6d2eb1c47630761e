"""The README and the pages of the documentation, as tests see them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def snippets(page: Path) -> list[str]:
    """Its Python code, each on the lines that it has in the page.

    Files that a page shows have a title, and are not among them.
    """
    text = page.read_text()
    found = re.finditer(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    return ["\n" * text.count("\n", 0, match.start(1)) + match[1] for match in found]


def commands(page: Path, program: str) -> list[list[str]]:
    """The arguments of every ``python -m program ...`` in its shell code."""
    blocks = re.findall(r"^```(?:bash|sh)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = (re.search(rf"python -m {re.escape(program)}\b(.*)", line) for line in lines)
    return [shlex.split(match[1], comments=True) for match in found if match]


def links(page: Path) -> list[str]:
    """The targets of its links and pictures, anchors included, that are not addresses."""
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    return [target for target in targets if not target.startswith("http")]
