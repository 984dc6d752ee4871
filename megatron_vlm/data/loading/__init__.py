"""Loaders: worker processes, data order and its exact resume.

loader.py   the training loader of a data-parallel rank, and the validation loader
encoder.py  energon's task encoder: samples to microbatches; those that can't be used are counted
workers.py  forked processes that run the dataset
shuffle.py  a shuffle buffer that ends with the epoch
state.py    energon's state as JSON
"""
