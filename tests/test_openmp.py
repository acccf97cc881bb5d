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


@pytest.mark.parametrize("parts", [1, 3, 20])
def test_every_part_is_worked_on_once(parts: int, threads: int) -> None:
    done: list[int] = []
    share_out(done.append, parts)
    assert sorted(done) == list(range(parts))


@pytest.mark.parametrize("threads", [3], indirect=True)
def test_parts_are_worked_on_at_the_same_time(threads: int) -> None:
    together, who = threading.Barrier(threads, timeout=60), set()

    def meet(part: int) -> None:
        together.wait()
        who.add(threading.get_native_id())

    share_out(meet, threads)
    assert len(who) == threads and threading.get_native_id() in who


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_what_it_raises_is_raised(kind: type[BaseException], threads: int) -> None:
    def fails(part: int) -> None:
        if part == 6:
            raise kind("the last part")

    with pytest.raises(kind, match="the last part"):
        share_out(fails, 7)


def test_many_callers_do_not_meet() -> None:
    def sum_of_parts(caller: int) -> list[Any]:
        found: list[Any] = []

        def work(part: int) -> None:
            time.sleep(0.001)
            found.append((caller, part))

        share_out(work, 3)
        return sorted(found)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(sum_of_parts, range(64)))
    assert results == [[(caller, part) for part in range(3)] for caller in range(64)]
