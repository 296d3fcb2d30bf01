"""Memory that processes share: an anonymous file that each process maps. It is freed when the last process ends."""

import mmap
import os
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.reduction import DupFd, recv_handle, send_handle
from typing import Any

import numpy as np

from fedtune.data.mapped import Place, place_of
from fedtune.operating_system import anonymous_file

Shape = tuple[int, ...]


class SharedArray:
    """A numpy array in shared memory. A process that starts with it as an argument gets an array over the same memory.

    The memory is zero at first. It takes none of the machine's memory until it is written.
    """

    def __init__(self, shape: Shape, dtype: str) -> None:
        self._descriptor = anonymous_file()
        weakref.finalize(self, os.close, self._descriptor)
        os.ftruncate(self._descriptor, _num_bytes(shape, dtype))
        self.array = _map(self._descriptor, shape, dtype)

    @classmethod
    def copy_of(cls, array: np.ndarray) -> "SharedArray":
        """A new array with the values of `array`."""
        shared = cls(array.shape, array.dtype.str)
        shared.array[...] = array
        return shared

    def send(self, connection: Connection) -> None:
        """Gives access to the same memory to the process at the other end, which must call `receive`."""
        connection.send((self.array.shape, self.array.dtype.str))
        send_handle(connection, self._descriptor, None)

    def __reduce__(self) -> tuple[Callable[..., np.ndarray], tuple[Any, ...]]:
        return _unpickle, (DupFd(self._descriptor), self.array.shape, self.array.dtype.str)


class MappedFile:
    """An array in a file. A process that starts with it as an argument maps the same file into its memory."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Callable[..., np.ndarray], tuple[Any, ...]]:
        return Place.map, (self.place,)


def share(array: np.ndarray) -> SharedArray | MappedFile:
    """The array as an argument for a new process. A mapped file or a view of one is not copied; other arrays are."""
    place = place_of(array)
    return SharedArray.copy_of(array) if place is None else MappedFile(place)


def receive(connection: Connection) -> np.ndarray:
    """The array that the other end of the connection sent, over the same memory."""
    shape, dtype = connection.recv()
    return _attach(recv_handle(connection), shape, dtype)


def _unpickle(descriptor: Any, shape: Shape, dtype: str) -> np.ndarray:
    return _attach(descriptor.detach(), shape, dtype)


def _attach(descriptor: int, shape: Shape, dtype: str) -> np.ndarray:
    try:
        return _map(descriptor, shape, dtype)
    finally:
        os.close(descriptor)  # the map holds a duplicate


def _map(descriptor: int, shape: Shape, dtype: str) -> np.ndarray:
    mapped = mmap.mmap(descriptor, _num_bytes(shape, dtype))
    return np.frombuffer(mapped, dtype, count=int(np.prod(shape))).reshape(shape)


def _num_bytes(shape: Shape, dtype: str) -> int:
    return max(1, int(np.prod(shape)) * np.dtype(dtype).itemsize)  # an empty file can't be mapped
