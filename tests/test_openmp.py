"""Work shared out to torch's threads: every part once, at the same time, with its errors, from many callers at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from point_peft.tuners.point_peft import openmp
from point_peft.tuners.point_peft.openmp import share_out

pytestmark = pytest.mark.skipif(openmp.PARALLEL is None, reason="torch's OpenMP has no GOMP_parallel")


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_every_part_is_worked_on_once(threads: int) -> None:
    done: list[tuple[int, int]] = []
    share_out(lambda part, parts: done.append((part, parts)))
    assert sorted(done) == [(part, threads) for part in range(threads)]


@pytest.mark.parametrize("threads", [3], indirect=True)
def test_parts_are_worked_on_at_the_same_time(threads: int) -> None:
    together, who = threading.Barrier(threads, timeout=60), set()

    def meet(part: int, parts: int) -> None:
        together.wait()
        who.add(threading.get_native_id())

    share_out(meet)
    assert len(who) == threads and threading.get_native_id() in who


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_what_it_raises_is_raised(kind: type[BaseException], threads: int) -> None:
    def fails(part: int, parts: int) -> None:
        if part == parts - 1:
            raise kind("the last part")

    with pytest.raises(kind, match="the last part"):
        share_out(fails)


def test_many_callers_do_not_meet() -> None:
    def sum_of_parts(caller: int) -> list[Any]:
        found: list[Any] = []

        def work(part: int, parts: int) -> None:
            time.sleep(0.001)
            found.append((caller, part))

        share_out(work)
        return sorted(found)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(sum_of_parts, range(64)))
    parts = range(torch.get_num_threads())
    assert results == [[(caller, part) for part in parts] for caller in range(64)]
