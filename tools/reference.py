"""Generate the pages of the schema and the rules of mbridge-config: `nox -s reference`.

With `--check`, write nothing and exit with 1 if a page is stale.
"""

import sys
from pathlib import Path

from mbridge_config.cli.reference import PAGES

DOCS = Path(__file__).parent.parent / "docs"


def main(check: bool) -> int:
    """Write or check the pages and return the exit code."""
    stale = []
    for name, page in PAGES.items():
        text, file = page(), DOCS / name
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            stale.append(name)
            if not check:
                file.write_text(text, encoding="utf-8")
    if stale:
        print(f"{', '.join(stale)}: {'stale, run `nox -s reference`' if check else 'written'}")
    return 1 if stale and check else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
