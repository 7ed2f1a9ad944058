"""Exceptions that users of the plugin see. Leaf module."""


class SiriusError(ValueError):
    """Base of every error the plugin raises on purpose."""


class SiriusConfigError(SiriusError):
    """An option has a bad value, is unknown, or contradicts another one."""


class SiriusUnsupportedError(SiriusError):
    """The model or the engine set-up cannot be served with Sirius."""


class SiriusIntegrationError(SiriusError):
    """The installed vLLM does not look like the one the plugin was written for."""
