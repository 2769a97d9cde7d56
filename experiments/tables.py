"""Write the tables of the README files from the JSON behind them.

    python experiments/tables.py            rewrite
    python experiments/tables.py --check    exit 1 if a table is not what its JSON says

A table stands between `<!-- table: quickstart -->` and `<!-- end -->` and comes from
`experiments/results/quickstart.json`, which is the `results.json` of a sweep.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from fedsim.sweep import table_of

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", ROOT / "experiments" / "README.md")
_BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def rendered(text: str) -> str:
    """A page with every table made anew."""

    def table(match: re.Match[str]) -> str:
        results = json.loads((ROOT / "experiments" / "results" / f"{match[2]}.json").read_text("utf-8"))
        return f"{match[1]}{table_of(results)}{match[3]}"

    return _BLOCK.sub(table, text)


def main(check: bool) -> int:
    """Rewrite the pages, or say which are stale."""
    stale = 0
    for page in PAGES:
        before = page.read_text("utf-8")
        after = rendered(before)
        if after != before:
            stale += 1
            print(f"{page.relative_to(ROOT)}: {'stale' if check else 'written'}")
            if not check:
                page.write_text(after, "utf-8")
    return int(check and stale > 0)


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
