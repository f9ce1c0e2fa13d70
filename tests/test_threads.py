"""What a block changes for the process, and gives back in many threads at once."""

from __future__ import annotations

import contextlib
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from conftest import in_a_new_thread
from threadpoolctl import threadpool_info, threadpool_limits

from dosmatgen_ase.threads import cpu_threads, once, one_blas_thread, without_warnings


@pytest.fixture(autouse=True)
def three() -> Iterator[None]:
    """The caller computes with three threads, and so does every thread that is started later."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_the_block_has_its_number_and_no_other_thread_has() -> None:
    with cpu_threads(1):
        assert torch.get_num_threads() == 1
        assert in_a_new_thread(torch.get_num_threads) == 3
        with cpu_threads(2):
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3
    assert in_a_new_thread(torch.get_num_threads) == 3


def test_it_comes_back_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), cpu_threads(1):
        _ = 1 / 0
    assert torch.get_num_threads() == 3


def test_a_thread_with_its_own_number_gets_it_back() -> None:
    def own() -> tuple[int, int]:
        torch.set_num_threads(2)
        with cpu_threads(1):
            inside = torch.get_num_threads()
        return inside, torch.get_num_threads()

    assert in_a_new_thread(own) == (1, 2)
    assert torch.get_num_threads() == 3


def test_blocks_that_overlap_in_several_threads() -> None:
    """The first to enter is the first to leave: a saved number of the process would come back as 1."""
    entered, left = threading.Barrier(8), threading.Barrier(8)
    seen: list[tuple[int, int]] = []

    def work(number: int) -> None:
        for turn in range(5):
            with cpu_threads(1):
                entered.wait()
                inside = torch.get_num_threads()
                if (number + turn) % 2:
                    left.wait()
            if not (number + turn) % 2:
                left.wait()
            seen.append((inside, torch.get_num_threads()))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(seen) == {(1, 3)}
    assert len(seen) == 40
    assert in_a_new_thread(torch.get_num_threads) == 3


def blas_threads() -> list[int]:
    return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]


@pytest.mark.parametrize(
    ("change", "state"), [(one_blas_thread, blas_threads), (without_warnings, lambda: list(warnings.filters))]
)
def test_threads_that_overlap_give_back_what_the_first_found(change: Any, state: Any) -> None:
    """The first to enter is the first to leave, and each would give back what it found."""
    entered, left = threading.Event(), threading.Event()

    def longer() -> None:
        with change():
            entered.set()
            left.wait()

    thread = threading.Thread(target=longer)
    outside = contextlib.nullcontext() if state is not blas_threads else threadpool_limits(2, user_api="blas")
    with outside:
        before = state()
        with change():
            assert state() != before
            thread.start()
            entered.wait()
            assert state() != before
        assert state() != before, "the other is inside"
        left.set()
        thread.join()
        assert state() == before
        with pytest.raises(ZeroDivisionError), change():
            _ = 1 / 0
        assert state() == before


def test_what_is_loaded_once_is_loaded_once_by_many_threads() -> None:
    calls: list[int] = []

    @once
    def load() -> list[int]:
        calls.append(1)
        if len(calls) == 1:
            raise OSError("no file")
        time.sleep(0.05)
        return calls

    with pytest.raises(OSError, match="no file"):
        load()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: load(), range(8)))
    assert len(calls) == 2, "an error is not kept"
    assert all(each is calls for each in found)
