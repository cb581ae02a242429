"""How codes are chosen. Every module here without a leading underscore (and `base`) is one method."""
