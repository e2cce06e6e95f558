"""Pictures and tables of docs/results.md and README.md, from the files of the runs."""

import re
from pathlib import Path

from .sections import SECTIONS, learned
from .tables import finished


DOCS = Path(__file__).parents[2] / "docs"
ON_THE_FRONT_PAGE = "kinds"


def draw() -> None:
    """Write the pictures, and the tables into their places on the pages."""
    for name, section in SECTIONS.items():
        if runs := section.runs():
            section.picture(runs, DOCS / "results" / f"{name}.png")
    for page, text in pages().items():
        page.write_text(text)


def pages() -> dict[Path, str]:
    """The pages as they have to be."""
    results, readme = DOCS / "results.md", DOCS.parent / "README.md"
    text = results.read_text()
    for name, section in SECTIONS.items():
        if runs := section.runs():
            text = placed(text, name, section.table(runs))
    front = learned(ON_THE_FRONT_PAGE, finished(ON_THE_FRONT_PAGE))
    return {results: text, readme: placed(readme.read_text(), ON_THE_FRONT_PAGE, front)}


def placed(text: str, name: str, block: str) -> str:
    """The page with a table between its two marks."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    if begin not in text:
        raise ValueError(f"The page has no place for {name!r}: add the lines {begin.strip()} and {end}.")
    return re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: f"{begin}{block}{end}", text, flags=re.DOTALL)
