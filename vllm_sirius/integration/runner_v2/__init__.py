"""Model Runner V2: what vLLM runs on GPUs."""
