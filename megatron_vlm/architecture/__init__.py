"""What a model is, read from config.json: its parts, their sizes and their parameters. Standard library only
(Python 3.9)."""
