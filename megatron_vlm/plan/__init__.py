"""What follows from a run and its model: rules, costs, memory, start. Standard library only (Python 3.9)."""
