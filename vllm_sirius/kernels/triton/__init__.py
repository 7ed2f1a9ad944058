"""The reduced FFN on CUDA, in Triton, on the weights that the target itself uses.

`kernels` has the FFNs, `statistics` the tap that feeds neuron statistics, `reference` their plain PyTorch twins. All of it
can be imported without Triton and without a GPU.
"""
