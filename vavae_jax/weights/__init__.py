"""Weights in files, read without PyTorch and without executing pickles."""
