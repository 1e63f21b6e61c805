"""Tests trace hundreds of networks; the garbage collector need not walk through the libraries each time."""

import gc


def pytest_collection_finish() -> None:
    """Set aside what importing made, and look for garbage every twenty thousand objects instead of seven hundred."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)
