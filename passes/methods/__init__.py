"""How codes are chosen. Every module here is one method."""
