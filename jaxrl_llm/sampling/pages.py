"""Pages of a cache: who holds which, so that rows with a common beginning share them."""

from __future__ import annotations

from collections.abc import Iterable


class PagePool:
    """Counts the holders of each of `num_pages` pages. A page without one is free."""

    def __init__(self, num_pages: int) -> None:
        self.holders = [0] * num_pages
        self._free = list(range(num_pages))[::-1]

    @property
    def in_use(self) -> int:
        """Pages that somebody holds."""
        return len(self.holders) - len(self._free)

    def take(self) -> int | None:
        """A free page with its first holder; None if there is none."""
        if not self._free:
            return None
        page = self._free.pop()
        self.holders[page] = 1
        return page

    def share(self, pages: Iterable[int]) -> None:
        """One more holder for each of `pages`."""
        for page in pages:
            self.holders[page] += 1

    def give_back(self, pages: Iterable[int]) -> None:
        """One holder less for each of `pages`."""
        for page in pages:
            self.holders[page] -= 1
            if not self.holders[page]:
                self._free.append(page)
