"""The parts of `serve.py`: batches of mixed adapters, HTTP, what is counted."""
