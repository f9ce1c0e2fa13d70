"""Copy the benchmark tables into README.md, between their include markers.

    python scripts/update_readme.py            # rewrite README.md
    python scripts/update_readme.py --check    # exit 1 if it is out of date
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
MARKER = re.compile(r"<!-- include: (?P<path>\S+) -->\n.*?<!-- /include -->", re.DOTALL)


def with_includes(text: str, root: Path = ROOT) -> str:
    """`text` with every include block replaced by the file that it names.

    Raises
    ------
    ValueError
        If a marker is not closed.
    """
    if text.count("<!-- include:") != len(MARKER.findall(text)) or text.count("<!-- /include -->") != text.count(
        "<!-- include:"
    ):
        raise ValueError("an include marker is not closed: write <!-- include: PATH --> ... <!-- /include -->")

    def block(match: re.Match[str]) -> str:
        path = root / match["path"]
        body = path.read_text().strip() if path.exists() else f"*Not measured yet: `{match['path']}` is missing.*"
        return f"<!-- include: {match['path']} -->\n{body}\n<!-- /include -->"

    return MARKER.sub(block, text)


def main() -> None:
    """Rewrite README.md, or check it."""
    parser = argparse.ArgumentParser(description="Copy the benchmark tables into README.md.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if README.md is out of date")
    check = parser.parse_args().check
    readme = ROOT / "README.md"
    old = readme.read_text()
    new = with_includes(old)
    if check and new != old:
        sys.exit("README.md is out of date: run python scripts/update_readme.py")
    if not check:
        readme.write_text(new)


if __name__ == "__main__":
    main()
