"""Another process, with other hashes, that forks children: to import torch takes longer than all that they do.

It prepares before it forks, so that a child begins at once with what counts.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

Job = Callable[..., Callable[[], None]]
"""A function of a test module: from strings, it prepares and returns what a child then does."""

SERVER = """
import importlib, os, sys
import torch._dynamo  # which optimizers and checkpoints import, for longer than children run
for line in sys.stdin:
    order, *words = line.split()
    if order == "wait":
        print(os.waitpid(int(words[0]), 0)[1], flush=True)
        continue
    work = getattr(importlib.import_module(words[0]), words[1])(*words[2:])
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    print(child, flush=True)
"""


class Server:
    def __init__(self) -> None:
        root = Path(__file__).parents[1]
        # A thread of torch would not be there in a child.
        settings = {"PYTHONHASHSEED": "77", "PYTHONPATH": str(root), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            env={**os.environ, **settings},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, job: Job, *words: object) -> int:
        """The id of a new process that does a job."""
        return self._ask("start", job.__module__, job.__name__, *words)

    def wait(self, child: int) -> int:
        """The status with which a process has ended, of which nothing runs any more."""
        return self._ask("wait", child)

    def number(self, job: Job, file: Path) -> float:
        """The number that a job leaves in a file of this name, which it is given."""
        status = self.wait(self.start(job, file))
        assert status == 0, f"the job ended with status {status}"
        return float(file.read_text("utf-8"))

    def _ask(self, *words: object) -> int:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def close(self) -> None:
        self.process.kill()
        with self.process:
            pass
