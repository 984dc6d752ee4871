"""The config of a run: its flags in sections, typed and checked. Standard library only (Python 3.9).

run.py         the config of a run: its sections, from flags, JSON and a site's file
sections/      the flags of run.py, a file for each section
flags.py       dataclass fields as flags, and the parser; checks.py: rules that sections share
headings.py    headings of --help
generation.py  the flags of generate.py
preview.py     the flags of preview.py
other_trainers/  arguments of other trainers, each with its flag here
"""
