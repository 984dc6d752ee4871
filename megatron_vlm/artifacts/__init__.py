"""What lies on disk: checkpoints, datasets, mixtures, templates. Standard library only (Python 3.9)."""
