"""A memory of texts under keys, which lives as long as an episode."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from jaxrl_llm.tools.tool import Tool, ToolError, tool


@dataclasses.dataclass
class KeyValueMemory:
    """Texts under keys, in the order in which the keys were first written. Make one for each episode.

    Attributes:
      max_entries, max_key_characters, max_value_characters: what it holds; more is refused, nothing is dropped.
      entries: what it holds now.

    Raises:
      ValueError: a limit below 1, or entries beyond the limits.
    """

    max_entries: int = 64
    max_key_characters: int = 64
    max_value_characters: int = 2000
    entries: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("max_entries", "max_key_characters", "max_value_characters"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; expected a whole number from 1 on")
        entries, self.entries = self.entries, {}
        for key, value in entries.items():
            try:
                self.write(key, value)
            except ToolError as error:
                raise ValueError(f"entries do not fit: {error}; raise the limit or leave the entry out") from error

    def write(self, key: str, value: str) -> bool:
        """Puts `value` under `key`; true if another was there.

        Raises:
          ToolError: a limit is passed, or the key is empty; the memory stays as it was.
        """
        if not key or len(key) > self.max_key_characters:
            raise ToolError(f"a key has 1 to {self.max_key_characters} characters, this one has {len(key)}")
        if len(value) > self.max_value_characters:
            raise ToolError(f"a value has at most {self.max_value_characters} characters, this one has {len(value)}")
        replaced = key in self.entries
        if not replaced and len(self.entries) >= self.max_entries:
            raise ToolError(f"the memory is full: {self.max_entries} entries; delete one first")
        self.entries[key] = value
        return replaced

    def read(self, key: str) -> str:
        """The value under `key`.

        Raises:
          ToolError: there is none.
        """
        self._check_known(key)
        return self.entries[key]

    def delete(self, key: str) -> None:
        """Takes `key` and its value away.

        Raises:
          ToolError: it is not there.
        """
        self._check_known(key)
        del self.entries[key]

    def search(self, text: str) -> list[str]:
        """Keys whose entry has `text` in its key or its value, whatever the case of letters."""
        wanted = text.casefold()
        return [key for key, value in self.entries.items() if wanted in key.casefold() or wanted in value.casefold()]

    def to_dict(self) -> dict[str, object]:
        """Limits and entries as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> KeyValueMemory:
        """The memory that `to_dict` wrote.

        Raises:
          ValueError: other fields than those, or entries beyond the limits.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if set(values) != names:
            raise ValueError(f"a memory has the fields {sorted(names)}, got {sorted(values)}")
        return cls(**values)  # type: ignore[arg-type]

    def _check_known(self, key: str) -> None:
        if key not in self.entries:
            shown = ", ".join(self.entries) or "none"
            raise ToolError(f"no entry {key[:100]!r}; keys: {shown}")


def memory_tools(memory: KeyValueMemory) -> list[Tool]:
    """The tools memory_write, memory_read, memory_list, memory_delete and memory_search over one memory."""

    def memory_write(key: str, value: str) -> str:
        """Keeps a text under a key for later turns, in place of what was there.

        Args:
          key: a short name.
          value: the text.
        """
        return "replaced" if memory.write(key, value) else "written"

    def memory_read(key: str) -> str:
        """Returns the text under a key.

        Args:
          key: its name.
        """
        return memory.read(key)

    def memory_list() -> str:
        """Lists the keys of the memory, a line for each with the length of its text."""
        lines = [f"{key} ({len(value)} characters)" for key, value in memory.entries.items()]
        return "\n".join(lines) or "the memory is empty"

    def memory_delete(key: str) -> str:
        """Deletes a key and its text.

        Args:
          key: its name.
        """
        memory.delete(key)
        return "deleted"

    def memory_search(text: str) -> str:
        """Lists the keys whose name or text contains a text.

        Args:
          text: what to look for, whatever the case of letters.
        """
        return "\n".join(memory.search(text)) or "nothing found"

    return [tool(function) for function in (memory_write, memory_read, memory_list, memory_delete, memory_search)]
