"""Connectors, which stand between an encoder and the language model, a file for each kind."""
