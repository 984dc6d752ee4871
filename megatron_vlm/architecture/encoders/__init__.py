"""Encoders, which turn pixels, frames or sound into features, a file for each kind."""
