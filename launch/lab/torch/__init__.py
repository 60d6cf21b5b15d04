"""Scripts for an interpreter that has PyTorch; they import nothing of this project."""
