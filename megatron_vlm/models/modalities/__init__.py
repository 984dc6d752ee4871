"""Kinds of media in a model: their modules, and where their features go in the text."""
