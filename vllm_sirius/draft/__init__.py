"""How the draft runs: the gated FFNs of a model, their reduced forms, the switch between target and draft, the self-test."""
