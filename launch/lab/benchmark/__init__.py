"""What steps, loading, FID and the tokenizer's parts cost, beside limits and the reference."""
