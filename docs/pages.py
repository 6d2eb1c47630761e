"""Links from the site into the repository: what a page links to becomes part of the site.

A hook of MkDocs. Pages link to files outside of ``docs`` by their place in the repository
(``../README.md``), which works wherever the repository is browsed; on the site those files are
pages, too, with everything that they link to in turn.
"""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
DOCS = "docs"
# The front page of the site is another one.
RENAMED = {"README.md": "readme.md"}
_LINK = re.compile(r"\[(?P<label>[^]]*)\]\((?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")


def relative_targets(text: str, place: str) -> Iterator[str]:
    """The files that a page links to, by their place in the repository.

    Args:
      text: Markdown.
      place: Where in the repository it is from.
    """
    for found in _LINK.finditer(text):
        if not re.match(r"[a-z]+:", found["target"]):
            yield posixpath.normpath(posixpath.join(posixpath.dirname(place), found["target"]))


def outside(places: list[str]) -> set[str]:
    """The files outside of ``docs`` that these pages link to, and those that they link to."""
    found: set[str] = set()
    left = list(places)
    while left:
        place = left.pop()
        is_page = place.endswith(".md") and (ROOT / place).is_file()
        text = (ROOT / place).read_text() if is_page else ""
        new = {t for t in relative_targets(text, place) if not t.startswith(f"{DOCS}/")} - found
        found |= new
        left.extend(new)
    return found


def on_files(files: Files, *, config: object) -> Files:
    """Adds the files that pages link to; a missing one is left for MkDocs to complain about."""
    pages = [f"{DOCS}/{file.src_uri}" for file in files.documentation_pages()]
    for place in sorted({*RENAMED, *outside([*RENAMED, *pages])}):
        if (ROOT / place).is_file():
            name = RENAMED.get(place, place)
            files.append(File.generated(config, name, abs_src_path=str(ROOT / place)))
    return files


def on_page_markdown(markdown: str, *, page: object, **_: object) -> str:
    """Points links of the repository to the places that their targets have on the site."""
    uri = page.file.src_uri
    place = next((old for old, new in RENAMED.items() if new == uri), None)
    if place is None:
        place = f"{DOCS}/{uri}" if (ROOT / DOCS / uri).is_file() else uri

    def moved(found: re.Match[str]) -> str:
        target = found["target"]
        if re.match(r"[a-z]+:", target):
            return found[0]
        there = posixpath.normpath(posixpath.join(posixpath.dirname(place), target))
        if (ROOT / there).is_dir():  # of which the site has no page
            return found["label"]
        there = RENAMED.get(there, there.removeprefix(f"{DOCS}/"))
        relative = posixpath.relpath(there, posixpath.dirname(uri) or ".")
        return f"[{found['label']}]({relative}{found['anchor'] or ''})"

    return _LINK.sub(moved, markdown)
