"""What a run is: its flags in sections, typed and checked. Standard library only (Python 3.9)."""
