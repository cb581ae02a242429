"""Checkpoints of true size with random weights, for memory, time, faults and exactness; they say nothing of quality."""
