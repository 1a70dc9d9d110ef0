"""How packed weights are multiplied: op schemas, the PyTorch reference, native kernels and the choice among them."""
