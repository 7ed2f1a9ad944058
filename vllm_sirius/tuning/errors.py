"""The failures of ``vllm-sirius tune``. Leaf module."""


class TuningError(Exception):
    """A failure that the user can act on; its text is the whole message."""


class TuningOptionError(TuningError):
    """An option or the file of prompts is bad."""


class TuningInterrupted(Exception):  # noqa: N818 - the user's wish, not an error
    """The user stopped the run; the text says what is lost."""
