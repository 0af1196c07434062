"""What a compiled program costs before it runs: matrix products, memory and communication, read off XLA's output."""
