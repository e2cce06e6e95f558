"""
What mkdocs does beside the pages in `docs/`: files of the repository that are pages, too, links to other files of it,
and the parts of pages that are generated.

Pages are read on GitHub as well, so they link to files where these are in the repository.
"""

import os
import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


sys.path.insert(0, str(Path(__file__).parent))

from generated import PARTS


ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
# Files that are pages of the site, too
PAGES = {
    "index.md": ROOT / "README.md",
    "figures.md": ROOT / "benchmarks" / "RESULTS.md",
    "contributing.md": ROOT / "CONTRIBUTING.md",
    "changelog.md": ROOT / "CHANGELOG.md",
}
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)(#[^)\s]*)?(?=\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, path in PAGES.items():
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    source = PAGES.get(page.file.src_uri, DOCS / page.file.src_uri)
    for name, part in PARTS.items():
        marker = f"<!-- generated: {name} -->"
        if marker in markdown:
            markdown = markdown.replace(marker, part())
    return LINK.sub(lambda link: _target(source, link[1], config) + (link[2] or ""), markdown)


def _target(source: Path, link: str, config: MkDocsConfig) -> str:
    """Where a link leads on the site. Links to files that do not exist stay as they are: mkdocs reports them."""
    path = Path(os.path.normpath(source.parent / link))
    for name, file in PAGES.items():
        if path == file:
            return name
    if not path.exists():
        return link
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    if not config.repo_url:
        return path.as_uri()
    kind = "tree" if path.is_dir() else "blob"
    return f"{config.repo_url.rstrip('/')}/{kind}/main/{path.relative_to(ROOT).as_posix()}"
