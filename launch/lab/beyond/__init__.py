"""What options beyond the paper are worth at small size; `__main__.py` is the command."""
