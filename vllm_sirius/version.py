"""The version of the package and of the vLLM it is written for: the single source of both."""

__version__ = "0.1.0"
TARGET_VLLM_VERSION = "0.32.0"
