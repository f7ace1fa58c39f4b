"""The experiments, one page a paper: `experiments/<family>/<slug>.py` with its config `configs/<family>/<slug>.py`.

A page has a docstring (its first line describes it in lists), `run(config, log)` and, if it makes tables, `TABLES`. It
may say what it is in `KIND` (default "algorithm").
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from jaxrl_llm.train.config import load_module, split_arm

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("list", "run", "sweep", "plan", "export")


class PageFiles(NamedTuple):
    """Where a page lies, relative to the checkout (absolute if outside of it)."""

    slug: str
    family: str
    page: Path
    config: Path


def all_pages() -> list[PageFiles]:
    """Every page of the checkout, by family and slug."""
    pages = sorted((ROOT / "experiments").glob("*/*.py"))
    return [_files(path.relative_to(ROOT)) for path in pages if not path.name.startswith("_")]


def find_page(name: str) -> PageFiles:
    """The page of a slug (`search_r1`), of a config or page file (`configs/agentic_search/search_r1.py`), or of a
    module path.

    A file elsewhere is a page if it has both `run` and `get_config`: it is then its own config file.

    Raises:
      ValueError: there is no such page, or two have that slug; those there are, are named.
    """
    if name.endswith(".py") or "/" in name or "." in name:
        path = Path(name) if name.endswith(".py") else Path(*name.split(".")).with_suffix(".py")
        path = path if path.is_absolute() or path.exists() else ROOT / path
        path = path.resolve()
        if not path.is_file():
            raise ValueError(f"no file {path}; name a page by its slug, its config file or its module path")
        inside = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
        if inside.parts[0] in ("configs", "experiments"):
            return _files(Path("experiments", *inside.parts[1:]))
        return PageFiles(path.stem, path.parent.name, inside, inside)
    pages = all_pages()
    found = [files for files in pages if files.slug == name]
    if len(found) != 1:
        what = f"{len(found)} pages have the slug" if found else "no page has the slug"
        raise ValueError(f"{what} {name!r}; there is {', '.join(f'{files.family}/{files.slug}' for files in pages)}")
    return found[0]


def _files(page: Path) -> PageFiles:
    return PageFiles(page.stem, page.parent.name, page, Path("configs", *page.parts[1:]))


def load_page(files: PageFiles) -> ModuleType:
    """Imports a page.

    Raises:
      ValueError: its file is missing, or it has no `run`.
    """
    path = ROOT / files.page
    if not path.is_file():
        raise ValueError(f"there is no page {path} for the config {files.config}")
    if files.page.is_absolute() or files.page.parts[0] != "experiments":
        module = load_module(path)
    else:
        if str(ROOT) not in sys.path:
            sys.path.insert(0, str(ROOT))
        module = importlib.import_module(".".join(files.page.with_suffix("").parts))
    if not hasattr(module, "run"):
        raise ValueError(f"{path} defines no run(config, log); a page must")
    return module


def split_name(name: str) -> tuple[PageFiles, str]:
    """`search_r1:tiny` -> the files of the page, and the arm (`small` where none is named)."""
    path, arm = split_arm(name)
    return find_page(path), arm
