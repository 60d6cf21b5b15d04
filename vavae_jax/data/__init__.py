"""Pictures: where they come from, in which order, how they become batches."""
