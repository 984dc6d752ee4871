"""What describes a run and a model: typed, checked, standard library only (Python 3.9)."""
