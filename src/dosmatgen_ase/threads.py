"""What a block of code changes for the whole process, and gives back: CPU threads of torch, numpy's legacy stream.

On cells of a few atoms a second thread costs more than it brings: it spins while it waits, and on busy cores it waits
long. So small batches run on one thread, and the caller's own number comes back afterwards.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

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
