"""The ids of clients that have no names."""

from collections.abc import Sequence
from typing import overload


class NumberedIds(Sequence[str]):
    """The ids "0", "1" and so on. An id is made when it is asked for, so that a million of them take no memory."""

    def __init__(self, num_clients: int) -> None:
        self._numbers = range(num_clients)

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        return str(self._numbers[index]) if isinstance(index, int) else [str(number) for number in self._numbers[index]]
