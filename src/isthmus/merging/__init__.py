"""Merging networks: everything here returns a new state and leaves its inputs as they were."""

from isthmus.merging._average import merge

__all__ = ["merge"]
