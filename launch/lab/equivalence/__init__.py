"""The PyTorch reference beside this project, layer by layer."""
