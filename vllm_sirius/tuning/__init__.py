"""``vllm-sirius tune``: measures drafts on the user's machine and prompts, and writes the settings that pay."""
