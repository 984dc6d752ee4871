"""Files, units and exit codes: what every floor above shares. Standard library only (Python 3.9)."""
