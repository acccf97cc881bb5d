"""The main job from data to adapter file: freeze a backbone, train one small adapter per task, swap between them.

    python -m examples.quickstart                                     # lifted digits, nothing to download
    python -m examples.quickstart --data radhar --file radhar.npz     # real radar recordings
    python -m examples.quickstart --compare --seeds 3                 # instead: beside full fine-tuning

It comes with the package, so that it also runs without this repository, as `python -m point_peft.quickstart`. What it
does is read from top to bottom in point_peft/quickstart/tour.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when it is run as a file, not with -m

from point_peft.quickstart.tour import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
