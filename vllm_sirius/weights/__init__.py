"""Weights as the draft and the target read them: rows of neurons, quantised copies, panels, and the memory they lie in."""
