"""What can go wrong with weights on a disk."""

from __future__ import annotations

from vllm_sirius.errors import SiriusError


class OffloadError(SiriusError):
    """The file of a target's weights cannot be made, or cannot be read as it was written; the message says what to do."""
