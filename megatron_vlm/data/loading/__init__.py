"""Loaders: worker processes, data order and its exact resume."""
