"""Results by content: a key in, a verified folder of files and facts out."""
