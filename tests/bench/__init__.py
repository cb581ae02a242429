"""Measurements for the README; each prints one table."""
