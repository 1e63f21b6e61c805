"""What can go wrong in a study besides its data and models."""

from __future__ import annotations

from isthmus.errors import IsthmusError

__all__ = ["StudyError"]


class StudyError(IsthmusError, ValueError):
    """Settings of a study or a training run that make no sense, or a training run that diverged."""
