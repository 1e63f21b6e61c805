"""Interruptions of commands in processes of their own."""

import signal

__all__ = ["heed_interrupts"]


def heed_interrupts() -> None:
    """Undo what a shell does to its background jobs, and theirs inherit: to ignore interrupts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
