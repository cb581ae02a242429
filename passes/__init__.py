"""Graph-to-graph rewrites. Every module here without a leading underscore (and `base`) is one pass."""
