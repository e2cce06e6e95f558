"""
The code in README.md and docs/*.md.

A comment before a block says what the test has to know of it, and is not shown by GitHub or the site:

- `<!-- not run: REASON -->`: it is checked only, as it needs what a test does not have.
- `<!-- before: CODE -->`: Python that runs before it, for what the page takes for granted.

Blocks whose first line is `# NAME.py` or `# NAME.yaml` are files.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt


ROOT = Path(__file__).parents[2]
PAGES = {path.name: path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
MARK = re.compile(r"<!-- (not run|before): (.*?)\s*-->", re.DOTALL)
FILE = re.compile(r"# (\w+\.(py|yaml))\n")


@dataclass(frozen=True)
class Block:
    """
    A block of code.

    Args:
        page (`str`):
            Name of the page.
        line (`int`):
            Its first line there, from 1 on.
        language (`str`):
            What stands behind the backticks.
        code (`str`):
            Its text.
        before (`str`):
            Python to run before it.
        not_run (`str`, *optional*):
            Why it cannot run in a test.
    """

    page: str
    line: int
    language: str
    code: str
    before: str = ""
    not_run: str | None = None

    @property
    def file(self) -> str | None:
        """The name of the file that it is, if it is one."""
        found = FILE.match(self.code)
        return found and found[1]


def blocks_of(page: str) -> list[Block]:
    """The blocks of code of a page."""
    found, marks = [], {}
    for token in MarkdownIt().enable("table").parse(PAGES[page].read_text()):
        if token.type == "html_block":
            marks |= {kind: text for kind, text in MARK.findall(token.content)}
        elif token.type == "fence":
            place = page, token.map[0] + 2, token.info, token.content
            found.append(Block(*place, marks.pop("before", ""), marks.pop("not run", None)))
        assert not marks or token.type == "html_block", f"{page}: {marks} is not followed by a block of code"
    return found


def inline_of(page: str) -> list[str]:
    """Pieces of code within the text of a page."""
    tokens = MarkdownIt().enable("table").parse(PAGES[page].read_text())
    return [child.content for token in tokens for child in token.children or () if child.type == "code_inline"]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
