"""The families of late-phase weights, one a file, and how they are put on a model and taken off again."""

from .attach import PARAMETRIZATIONS, Attachment, attach, detach, fold, write
from .members import Members
from .targets import Found, Target, find_targets


__all__ = [
    "PARAMETRIZATIONS",
    "Attachment",
    "Found",
    "Members",
    "Target",
    "attach",
    "detach",
    "find_targets",
    "fold",
    "write",
]
