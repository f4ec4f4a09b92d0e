"""Data sources, samples and few-shot sets: numpy and pyarrow, one process."""
