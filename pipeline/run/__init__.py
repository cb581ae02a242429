"""A recipe in, a proven folder out: the one loop, every step recalled or run."""
