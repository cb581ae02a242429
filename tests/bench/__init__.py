"""Measurements for docs/; each prints one table."""
