"""What a run folder holds: state, optimiser, checkpoints and fingerprints, metrics, and how weights are restored."""
