"""Model Runner V1: what vLLM's CPU build runs."""
