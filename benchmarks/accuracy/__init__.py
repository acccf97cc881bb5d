"""A comparison of accuracies that anyone can run, of all methods on several sets: `python -m benchmarks.accuracy`."""
