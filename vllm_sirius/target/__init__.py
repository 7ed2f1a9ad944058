"""How the target runs in a verification step: which kernel computes its linear layers on a few tokens."""
