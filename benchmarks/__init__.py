"""One benchmark of speed, memory and file sizes that anyone can run: `python -m benchmarks.speed`."""
