"""Softmax attention: what a query may see, the plain path, kernels for TPUs and GPUs, and the choice among them."""
