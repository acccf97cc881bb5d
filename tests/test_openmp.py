"""Work shared out to torch's threads: every part once, at the same time, with its errors, from many callers at once."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from point_peft.tuners.point_peft import openmp
from point_peft.tuners.point_peft.openmp import share_out

pytestmark = pytest.mark.skipif(openmp.PARALLEL is None, reason="torch's OpenMP has no GOMP_parallel")


@pytest.mark.parametrize("parts", [1, 3, 20])
@pytest.mark.usefixtures("torch_threads")
def test_every_part_is_worked_on_once(parts: int) -> None:
    done: list[int] = []
    share_out(done.append, parts)
    assert sorted(done) == list(range(parts))


def test_parts_are_worked_on_at_the_same_time(torch_threads: int) -> None:
    together, who = threading.Barrier(torch_threads, timeout=60), set()

    def meet(part: int) -> None:
        together.wait()
        who.add(threading.get_native_id())

    share_out(meet, torch_threads)
    assert len(who) == torch_threads and threading.get_native_id() in who


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
@pytest.mark.usefixtures("torch_threads")
def test_what_it_raises_is_raised(kind: type[BaseException]) -> None:
    def fails(part: int) -> None:
        if part == 6:
            raise kind("the last part")

    with pytest.raises(kind, match="the last part"):
        share_out(fails, 7)


@pytest.mark.usefixtures("torch_threads")
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
