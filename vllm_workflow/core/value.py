"""What the values have in common of which several are made per call.

Each lists its fields in `__slots__` and sets them in a plain `__init__`: of all ways to write a
frozen value that is the cheapest to make and to read, interpreted and, more so, compiled.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self


class Value:
    """Compared, hashed, copied and shown by its fields, as a named tuple, which it is not.

    Fields are `Final`. Two that are both `nan` are equal.
    """

    __slots__ = ()
    _fields: ClassVar[tuple[str, ...]] = ()

    def _asdict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return {name: getattr(self, name) for name in self._fields}

    def _replace(self, **changes: Any) -> Self:
        """Return a copy with other values of some fields."""
        cls: Any = type(self)
        values = self._asdict()
        values.update(changes)
        made: Self = cls(**values)
        return made

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if type(self) is not type(other):
            return False
        for name in self._fields:
            mine, others = getattr(self, name), getattr(other, name)
            if mine is not others and mine != others and (mine == mine or others == others):
                return False
        return True

    def __hash__(self) -> int:
        return hash(tuple([getattr(self, name) for name in self._fields]))

    def __repr__(self) -> str:
        fields = ", ".join([f"{name}={getattr(self, name)!r}" for name in self._fields])
        return f"{type(self).__name__}({fields})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple([getattr(self, name) for name in self._fields])
