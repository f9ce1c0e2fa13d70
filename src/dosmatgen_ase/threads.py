"""What a block of code changes for the whole process, and gives back, in many threads at once.

CPU threads of torch and of BLAS, numpy's legacy stream, the filters of warnings; and what is loaded once.

On cells of a few atoms a second thread costs more than it brings: it spins while it waits, and on busy cores it waits
long. So small batches run on one thread, and the caller's own number comes back afterwards.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial, wraps
from typing import Any, TypeVar

Result = TypeVar("Result")

_LOCK = threading.Lock()


@contextlib.contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Compute with ``count`` CPU threads inside of this block; other threads of the process keep their number.

    May be used in several threads at once, and in one another.
    """
    before = _set(count)
    try:
        yield
    finally:
        _set(before)


def _set(count: int) -> int:
    """Set the number of CPU threads for the thread that calls this, and for no other; return what it was.

    ``torch.set_num_threads`` also sets the number with which threads begin that have not used torch yet. A new thread
    reads that number, and puts it back.
    """
    import torch

    with _LOCK:
        before = torch.get_num_threads()
        if before != count:
            default = _in_a_new_thread(torch.get_num_threads)
            torch.set_num_threads(count)
            if default != count:
                _in_a_new_thread(lambda: torch.set_num_threads(default))
        return int(before)


def _in_a_new_thread(job: Callable[[], Any]) -> Any:
    result: list[Any] = []
    thread = threading.Thread(target=lambda: result.append(job()))
    thread.start()
    thread.join()
    return result[0]


class _Shared:
    """A change of the whole process for a block: the first thread that enters makes it, the last takes it back.

    If each gave back what it found, the last to leave would leave the change behind that another had made.
    """

    def __init__(self, change: Callable[[], AbstractContextManager[Any]]) -> None:
        self._change, self._lock, self._inside = change, threading.RLock(), 0

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if not self._inside:
                self._made = self._change()
                self._made.__enter__()
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self._made.__exit__(None, None, None)


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    from threadpoolctl import OpenBLASController, threadpool_limits

    with threadpool_limits(limits=1, user_api="blas"):
        try:
            yield
        finally:
            OpenBLASController.clear_controlling_thread(force=True)  # who leaves may not be who entered, who alone may


one_blas_thread = _Shared(_limited)
"""One thread of BLAS inside of a block: for small matrices, where several threads wait for each other."""

without_warnings = _Shared(partial(warnings.catch_warnings, action="ignore"))
"""No warnings inside of a block, of any thread: for libraries that warn of their own code."""


def once(load: Callable[[], Result]) -> Callable[[], Result]:
    """Let a function without arguments run once in a process: threads that ask meanwhile wait for its result."""
    lock, kept = threading.Lock(), list[Result]()

    @wraps(load)
    def loaded() -> Result:
        if not kept:
            with lock:
                if not kept:
                    kept.append(load())
        return kept[0]

    return loaded


_borrowed: list[Any] = []  # the caller's state of the legacy stream, once for each block that runs


@contextlib.contextmanager
def legacy_stream() -> Iterator[None]:
    """Let libraries draw from numpy's legacy stream: the same numbers each time, and the caller's stream comes back.

    May be used in several threads at once: the last that leaves gives back what the first found.
    """
    import numpy as np

    with _LOCK:
        _borrowed.append(_borrowed[0] if _borrowed else np.random.get_state())  # noqa: NPY002
        np.random.seed(0)  # noqa: NPY002
    try:
        yield
    finally:
        with _LOCK:
            np.random.set_state(_borrowed.pop())  # noqa: NPY002
