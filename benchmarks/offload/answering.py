"""What programs that answer prompts have in common. Leaf module."""

from __future__ import annotations


class AnsweringError(Exception):
    """A program did not start or stopped answering; the text has the reason and the path of its log."""
