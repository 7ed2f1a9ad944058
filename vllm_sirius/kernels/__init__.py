"""All native kernels, for CPU in C++ and for GPU in Triton, each with a plain PyTorch twin."""
