"""The architecture of a model, read from config.json: its parts, their sizes and their parameters.

Standard library only (Python 3.9).
"""
