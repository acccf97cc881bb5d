"""Bytes: the most that torch's allocator had handed out at once; and with them the seconds of a training step."""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile

TIMED_STEPS = 5


def cost_of(step: Callable[[], object]) -> tuple[int, float]:
    """The most bytes of a first step on a CPU, and this process's seconds for one, by the median of a few."""
    peak, taken = peak_bytes(step, torch.device("cpu")), []
    for _ in range(TIMED_STEPS):
        start = time.process_time()
        step()
        taken.append(time.process_time() - start)
    return peak, median(taken)


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most bytes that tensors made within a run took at once, temporary ones within an operation included.

    On a GPU, torch's allocator counts them. On a CPU the profiler notes every allocation and release: exact, and the
    same in every process, while a resident set also holds what malloc keeps for later (with
    MALLOC_MMAP_THRESHOLD_=65536 MALLOC_TRIM_THRESHOLD_=65536 it keeps little, and both agree within 2 %).
    """
    return _peak_of_gpu(run, device) if device.type == "cuda" else _peak_of_cpu(run)


def _peak_of_gpu(run: Callable[[], object], device: torch.device) -> int:
    gc.collect()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before


def _peak_of_cpu(run: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
        gc.collect()  # what is released later would be taken for a release in the next run
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = [(event["ts"], event["args"]) for event in events if event.get("name") == "[memory]"]
    total = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        total += change["Bytes"]
        peak = max(peak, total)
    return peak
