"""Pages name files that exist: every path in backticks, and every link to a file."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    path
    for pattern in ("*.md", "docs/*.md", "packages/*/*.md", "apps/*/*.md")
    for path in sorted(ROOT.glob(pattern))
    if path.name != "CHANGELOG.md"
]
BASES = [ROOT, *ROOT.glob("packages/*/src"), *ROOT.glob("apps/*/src")]
"""A path in backticks is relative to the repository or to the folder that holds a package."""


def paths(text: str) -> list[str]:
    """Everything in backticks that looks like a path: words, dots and slashes, outside blocks of code."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([\w.-]+/[\w./-]*)`", prose)


def test_paths_are_found() -> None:
    text = "`a/b.py`, `c/`, `a b/c`, `x` and `d/e`\n```\n`f/g`\n```\n"
    assert paths(text) == ["a/b.py", "c/", "d/e"]


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "docs/architecture.md"])
def test_paths_exist(name: str) -> None:
    missing = [it for it in paths((ROOT / name).read_text()) if not any((base / it).exists() for base in BASES)]
    assert not missing, f"{name} names files that are not there: {', '.join(missing)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", page.read_text())
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing, f"{page} links to files that are not there: {', '.join(missing)}"
