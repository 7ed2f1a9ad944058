"""Which neurons of each FFN the draft keeps. Torch only; knows nothing of models, kernels or vLLM."""
