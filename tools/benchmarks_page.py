"""Make docs/benchmarks.md: tools/benchmarks.md.in with the figures of benchmarks/results.

    python tools/benchmarks_page.py

`{{grid some_key}}` is that number of the summary in grid.json; with its `_low` and `_high`, if it
has them, it is a ratio with its interval. `{{grid some_key:.1%}}` formats it.
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"


def page() -> str:
    """The page as the records have it.

    Raises:
        KeyError: the template names a figure that no record has.
    """
    files = (ROOT / "benchmarks" / "results").glob("*.json")
    summaries = {file.stem: json.loads(file.read_text())["summary"] for file in files}

    def figure(match: re.Match[str]) -> str:
        record, key, form = match.groups()
        summary = summaries[record]
        if form:
            return format(summary[key], form)
        if f"{key}_low" not in summary:
            return f"{summary[key]:,}"
        low, high = summary[f"{key}_low"], summary[f"{key}_high"]
        return f"{summary[key]:.2f}× [{low:.2f}, {high:.2f}]"

    template = (ROOT / "tools" / "benchmarks.md.in").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+) (\w+)(?::([^}]+))?\}\}", figure, template)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
