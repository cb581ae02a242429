"""Graph-to-graph rewrites. Every module here but `base` and `registry` is one pass."""
