"""Files, processes and units, which every floor above shares. Standard library only (Python 3.9).

files.py               what may lie where a file is looked for; reading and writing files whole
locks.py               locks that end with the processes that hold them
processes.py           processes that end with the one that started them
registry.py            registries that are filled by listing a folder
units.py               sizes and numbers as people read them
exit_codes.py          how run.py and each rank end
yaml_subset.py         the part of YAML that a mixture needs
transformer_engine.py  which releases of Transformer Engine fit
"""
