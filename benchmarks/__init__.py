"""Benchmarks of speed, memory and numbers; see docs/performance.md."""
