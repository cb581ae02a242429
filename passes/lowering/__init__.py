"""Rewrites on the way to an engine: a quantized graph in, a graph that one engine can hold out. No words of a recipe."""
