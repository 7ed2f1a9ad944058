"""What `vllm-sirius doctor` says about the environment, and repairs in it. Needs nothing but Python's own library."""
