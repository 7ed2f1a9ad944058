"""Kernels of the reduced FFN, each with a plain PyTorch twin in `reference`."""
