"""Lists the experiments, with what became of each claim of their tables.

python -m experiments.list [--family=agentic_search] [--json]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import ROOT, PageFiles, all_pages, load_page


def describe(files: PageFiles, results: Path = ROOT / "results") -> dict[str, Any]:
    """`{"slug", "kind", "family", "line", "page", "config", "tables": {name: {claim: outcome}}}` of a page.

    An outcome is "holds", "does not hold", "undecided" or "not run", as `results/<slug>/<table>.json` has it. A page
    that cannot be imported is described too: its line is the error.
    """
    entry: dict[str, Any] = {"slug": files.slug, "kind": "algorithm", "family": files.family, "line": ""}
    entry |= {"page": files.page.as_posix(), "config": files.config.as_posix(), "tables": {}}
    try:
        page = load_page(files)
    except Exception as error:  # One broken page must not hide the others.
        return entry | {"line": f"cannot be imported: {type(error).__name__}: {error}"}
    entry["kind"] = getattr(page, "KIND", "algorithm")
    entry["line"] = (page.__doc__ or "").strip().split("\n")[0]
    for name, table in getattr(page, "TABLES", {}).items():
        path = results / files.slug / f"{name}.json"
        found = json.loads(path.read_text())["claims"] if path.exists() else {}
        entry["tables"][name] = {
            claim.text: found.get(claim.text, {}).get("outcome", "not run") for claim in table.claims
        }
    return entry


def status(tables: dict[str, dict[str, str]]) -> str:
    """`main: 3 hold, 1 undecided`, for each table."""
    words = {"holds": "hold", "does not hold": "do not hold"}
    parts = []
    for name, claims in tables.items():
        counts = Counter(words.get(outcome, outcome) for outcome in claims.values())
        parts.append(f"{name}: " + (", ".join(f"{number} {word}" for word, number in counts.items()) or "no claims"))
    return "; ".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for a family that there is not."""
    parser = argparse.ArgumentParser(prog="python -m experiments.list", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--family", help="only this family")
    parser.add_argument("--json", action="store_true", help="a JSON list")
    options = parser.parse_args(arguments)
    pages = all_pages()
    families = sorted({files.family for files in pages})
    if options.family and options.family not in families:
        print(f"error: no family {options.family!r}; there is {', '.join(families)}", file=sys.stderr)
        return 2
    entries = [describe(files) for files in pages if options.family in (None, files.family)]
    if options.json:
        print(json.dumps(entries, indent=2))
        return 0

    from tabulate import tabulate

    columns = ("slug", "kind", "family", "line", "page", "config")
    rows = [[*(entry[column] for column in columns), status(entry["tables"])] for entry in entries]
    print(tabulate(rows, headers=[*columns, "tables"], maxcolwidths=[None, None, None, 60, None, None, 40]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
