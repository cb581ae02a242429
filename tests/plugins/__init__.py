"""What somebody else might write: modules that recipes name by their dotted names, and nothing in the package knows."""
