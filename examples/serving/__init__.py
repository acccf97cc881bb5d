"""The parts of `serve.py` (batches of mixed adapters, what is counted) and of `load.py` (adapters to try, a client)."""
