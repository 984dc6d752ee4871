"""Metrics, and where they go.

metrics.py  metrics.jsonl, and the console line of an iteration
sinks.py    metrics.jsonl, TensorBoard and Weights & Biases as one
"""
