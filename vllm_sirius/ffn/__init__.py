"""How a reduced FFN runs: finding the gated FFNs of a model, their weights, and the switch between target and draft."""
