"""Memory that processes share: an anonymous file, mapped by each, gone when the last one that holds it ends."""

import mmap
import os
import tempfile
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle

import numpy as np
import torch


class SharedArray:
    """A numpy array in shared memory."""

    def __init__(self, descriptor: int, shape: tuple[int, ...], dtype: str) -> None:
        self._descriptor = descriptor
        self._map = mmap.mmap(descriptor, _num_bytes(shape, dtype))
        self.array: np.ndarray = np.frombuffer(self._map, dtype, count=int(np.prod(shape))).reshape(shape)

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: str) -> "SharedArray":
        """A new array; its pages take no memory until they are written."""
        return cls(_anonymous_file(_num_bytes(shape, dtype)), shape, dtype)

    @classmethod
    def copy_of(cls, array: np.ndarray) -> "SharedArray":
        """A new array with the values of `array`."""
        shared = cls.empty(array.shape, array.dtype.str)
        shared.array[...] = array
        return shared

    def tensor(self) -> torch.Tensor:
        """The same memory as a torch tensor."""
        return torch.from_numpy(self.array)

    def send(self, connection: Connection) -> None:
        """Gives the process at the other end of the connection access to the same memory."""
        connection.send((self.array.shape, self.array.dtype.str))
        send_handle(connection, self._descriptor, None)

    @classmethod
    def receive(cls, connection: Connection) -> "SharedArray":
        """What the other end sent."""
        shape, dtype = connection.recv()
        return cls(recv_handle(connection), shape, dtype)

    def __del__(self) -> None:
        os.close(self._descriptor)


def _num_bytes(shape: tuple[int, ...], dtype: str) -> int:
    return max(1, int(np.prod(shape)) * np.dtype(dtype).itemsize)  # an empty file can't be mapped


def _anonymous_file(size: int) -> int:
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("fedtune", os.MFD_CLOEXEC)
    else:  # where there is no memfd, an unlinked temporary file does the same
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor
