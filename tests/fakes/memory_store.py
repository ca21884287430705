"""A ``Store`` in memory."""

from __future__ import annotations


class MemoryStore:
    """Keys and values, as long as this object lives."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def put(self, key: str, value: str) -> None:
        self.values[key] = value

    def put_new(self, key: str, value: str) -> bool:
        return self.values.setdefault(key, value) is value

    def get(self, key: str) -> str | None:
        return self.values.get(key)

    def keys(self, prefix: str) -> list[str]:
        return [key for key in self.values if key.startswith(prefix)]

    def delete(self, key: str) -> None:
        self.values.pop(key, None)
