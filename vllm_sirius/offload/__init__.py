"""Weights that do not fit: the target's own, in a file in the order in which a pass reads them, and streamed from it."""
