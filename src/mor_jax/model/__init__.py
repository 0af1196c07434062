"""The Mixture-of-Recursions Transformer: layers, attention, routing, recursion, and their exact costs."""
