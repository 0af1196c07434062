"""One operation a file or folder: a plain reference, its kernels, and one function that chooses among them and logs."""
