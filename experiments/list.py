"""Lists the experiments, with what became of each claim of their tables.

python -m experiments.list [--family=agentic_search] [--json]
python -m experiments.list --write      # puts the same into experiments/<family>/README.md and results/README.md
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import ROOT, PageFiles, all_pages, load_page

OUTCOMES = {"holds": "held", "does not hold": "did not hold", "undecided": "undecided", "not run": "not run"}
MARKS = ("<!-- what follows is written by `python -m experiments.list --write` -->", "<!-- until here -->")


def describe(files: PageFiles, results: Path = ROOT / "results") -> dict[str, Any]:
    """`{"slug", "kind", "family", "line", "page", "config", "tables": {name: {claim: outcome}}, "needs_scale"}`.

    An outcome is "holds", "does not hold", "undecided" or "not run", as `results/<slug>/<table>.json` has it.
    `needs_scale` are claims of the paper that no small policy can show. A page that cannot be imported is described
    too: its line is the error.
    """
    entry: dict[str, Any] = {"slug": files.slug, "kind": "algorithm", "family": files.family, "line": ""}
    entry |= {"page": files.page.as_posix(), "config": files.config.as_posix(), "tables": {}, "needs_scale": []}
    try:
        page = load_page(files)
    except Exception as error:  # One broken page must not hide the others.
        return entry | {"line": f"cannot be imported: {type(error).__name__}: {error}"}
    entry["kind"] = getattr(page, "KIND", "algorithm")
    entry["line"] = (page.__doc__ or "").strip().split("\n")[0]
    entry["needs_scale"] = list(getattr(page, "NEEDS_SCALE", ()))
    for name, table in getattr(page, "TABLES", {}).items():
        path = results / files.slug / f"{name}.json"
        found = json.loads(path.read_text())["claims"] if path.exists() else {}
        entry["tables"][name] = {
            claim.text: found.get(claim.text, {}).get("outcome", "not run") for claim in table.claims
        }
    return entry


def describe_surveys(family: str) -> list[dict[str, Any]]:
    """The papers of a family that are paragraphs of its README and no pages: headings `### slug: title`."""
    readme = ROOT / "experiments" / family / "README.md"
    headings = re.findall(r"^### (\w+): (.+)$", readme.read_text(), re.MULTILINE) if readme.exists() else []
    page = readme.relative_to(ROOT).as_posix()
    return [
        {"slug": slug, "kind": "survey", "family": family, "line": line, "page": page, "config": None, "tables": {}}
        | {"needs_scale": []}
        for slug, line in headings
    ]


def all_entries() -> list[dict[str, Any]]:
    """Every page and every survey of the checkout."""
    pages = all_pages()
    surveys = [entry for family in sorted({files.family for files in pages}) for entry in describe_surveys(family)]
    return [describe(files) for files in pages] + surveys


def count_outcomes(entries: Sequence[dict[str, Any]]) -> Counter[str]:
    """How many claims held, did not hold, are undecided, were not run, or need a larger policy than a table has."""
    outcomes = [outcome for entry in entries for claims in entry["tables"].values() for outcome in claims.values()]
    counts = Counter({word: 0 for word in (*OUTCOMES.values(), "not reproducible small")})
    counts.update(OUTCOMES[outcome] for outcome in outcomes)
    counts["not reproducible small"] = sum(len(entry["needs_scale"]) for entry in entries)
    return counts


def status(tables: dict[str, dict[str, str]]) -> str:
    """`main: 3 held, 1 undecided`, for each table."""
    parts = []
    for name, claims in tables.items():
        counts = Counter(OUTCOMES[outcome] for outcome in claims.values())
        parts.append(f"{name}: " + (", ".join(f"{number} {word}" for word, number in counts.items()) or "no claims"))
    return "; ".join(parts)


def family_table(entries: Sequence[dict[str, Any]]) -> str:
    """A family's papers as a Markdown table."""
    from tabulate import tabulate

    rows = [
        [f"`{entry['slug']}`", entry["kind"], entry["line"], status(entry["tables"]), "; ".join(entry["needs_scale"])]
        for entry in entries
    ]
    headers = ["paper", "kind", "in a line", "claims here", "not reproducible small"]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def summary_table(entries: Sequence[dict[str, Any]]) -> str:
    """How many claims of each family came out how, as a Markdown table."""
    from tabulate import tabulate

    families = sorted({entry["family"] for entry in entries})
    parts = {name: [entry for entry in entries if entry["family"] == name] for name in families} | {"all": entries}
    counts = {name: count_outcomes(part) for name, part in parts.items()}
    rows = [[name, len(parts[name]), *count.values()] for name, count in counts.items()]
    return tabulate(rows, headers=["family", "papers", *counts["all"]], tablefmt="github")


def tables_to_write(entries: Sequence[dict[str, Any]]) -> dict[Path, str]:
    """What the READMEs that hold a table of outcomes, between two marks, should say now."""
    tables = {ROOT / "results" / "README.md": summary_table(entries)}
    for family in {entry["family"] for entry in entries}:
        part = [entry for entry in entries if entry["family"] == family]
        tables[ROOT / "experiments" / family / "README.md"] = family_table(part)
    texts = {}
    for path, table in tables.items():
        text = path.read_text() if path.exists() else ""
        before, first, rest = text.partition(MARKS[0])
        if first:
            texts[path] = f"{before}{first}\n\n{table}\n\n{MARKS[1]}{rest.partition(MARKS[1])[2]}"
    return texts


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for a family that there is not."""
    parser = argparse.ArgumentParser(prog="python -m experiments.list", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--family", help="only this family")
    parser.add_argument("--json", action="store_true", help="a JSON list")
    parser.add_argument("--write", action="store_true", help="renew the tables in the READMEs")
    options = parser.parse_args(arguments)
    entries = all_entries()
    families = sorted({entry["family"] for entry in entries})
    if options.family and options.family not in families:
        print(f"error: no family {options.family!r}; there is {', '.join(families)}", file=sys.stderr)
        return 2
    if options.write:
        for path, text in tables_to_write(entries).items():
            path.write_text(text)
            print(path.relative_to(ROOT))
        return 0
    entries = [entry for entry in entries if options.family in (None, entry["family"])]
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
