"""YAML text in, a checked, typed `Recipe` out, and edited recipes as YAML again."""
