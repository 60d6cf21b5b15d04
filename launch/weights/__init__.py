"""What a file of weights is, and where the released ones are."""
