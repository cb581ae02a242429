"""The command line: words and options in, calls of `lowbit`'s API, tables or JSON out. A file for each word."""
