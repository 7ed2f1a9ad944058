"""Measuring engines from outside: what the demo, the tuner and the benchmarks share."""
