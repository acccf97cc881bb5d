"""The parts of `serve.py`: batches of mixed adapters, what is counted, adapters to try it with."""
