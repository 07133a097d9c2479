"""What the model's calls return can be read as transformers' outputs are: by attribute, by name, by place."""

from collections.abc import Iterator
from typing import Any, ClassVar


class Output:
    """Base of a dataclass whose fields that are None are not there: for keys, places and tuples."""

    order: ClassVar[tuple[str, ...]]  # the fields as transformers orders them

    def keys(self) -> list[str]:
        return [name for name in self.order if getattr(self, name) is not None]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def values(self) -> list[Any]:
        return [getattr(self, name) for name in self.keys()]

    def items(self) -> list[tuple[str, Any]]:
        return list(zip(self.keys(), self.values(), strict=True))

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())

    def __getitem__(self, key: str | int | slice) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self.keys():
            raise KeyError(f"{type(self).__name__} holds {', '.join(self.keys())}; it has no {key!r}")
        return getattr(self, key)
