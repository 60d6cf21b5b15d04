"""The published numbers: what each depends on, what is checked, and the stages that make it."""
