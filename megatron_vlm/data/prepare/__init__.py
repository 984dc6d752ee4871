"""From people's files to a prepared dataset; scripts/data/prepare.py is its command.

build.py     the way through, restarts, the finished folder
sources.py   containers: JSON, JSON lines, Parquet, Arrow, tars, cut into units
records/     one record of any shape to messages and images
stage.py     first pass: units to conversations that can be read in any order
plan.py      duplicates, split, order, shards
pictures.py  images looked through, made smaller where asked
shards.py    second pass: planned samples to tars
files.py     files that people give, and what is none
workers.py   the processes of both passes; energon.py, energon's own command in one of them
rejections.py every record that is not trained on, by reason
histogram.py how long and how large samples are; lengths.py counts their tokens
report.py    the report of all that
check.py     a prepared folder looked through before training
"""
