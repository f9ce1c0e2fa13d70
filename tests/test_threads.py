"""The number of CPU threads inside of a block, and outside of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from conftest import in_a_new_thread

from dosmatgen_ase.threads import cpu_threads


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
