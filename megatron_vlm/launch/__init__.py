"""From a run config to processes: commands, container, preflight. Standard library only (Python 3.9)."""
