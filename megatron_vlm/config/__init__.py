"""The config of a run: its flags in sections, typed and checked. Standard library only (Python 3.9)."""
