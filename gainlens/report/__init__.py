"""Files that a person reads: figures, the page, the command line."""
