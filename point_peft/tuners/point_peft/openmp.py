"""Compiled work in the threads that torch computes with.

Threads of OpenMP go on asking for work for milliseconds after a loop. Other threads beside torch's would wait for cores
that these hold, and then hold them themselves.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch

Callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def _found() -> Any:
    """GOMP_parallel(function, data, threads, flags), which GCC makes of a parallel region, of torch's own OpenMP."""
    try:
        # Looked for in torch's extension and then in what it is linked with.
        function = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except AttributeError:  # torch was built without OpenMP, or with one that GCC's programs cannot use
        return None
    function.argtypes, function.restype = [Callback, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return function


PARALLEL = _found()
"""None where there is no such thing, and nothing can be shared out."""


def share_out(work: Callable[[int], None], parts: int) -> None:
    """Call work(part) for so many parts, up to as many at once as torch has threads; what it raises is raised here.

    They run at once for as long as `work` does not hold Python's lock.
    """
    threads = min(parts, torch.get_num_threads())
    if threads == 1:  # as in a child of a fork, which cannot use the threads of its parent
        for part in range(parts):
            work(part)
        return
    left, raised = iter(range(parts)), []

    def take(_: object) -> None:
        try:
            for part in left:
                work(part)
        except BaseException as error:  # no exception finds its way through OpenMP: it is raised below
            raised.append(error)

    PARALLEL(Callback(take), None, threads, 0)
    for error in raised:
        raise error
