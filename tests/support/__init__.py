"""Helpers shared by the tests: tiny models, built on the spot and without a network."""
