"""The tiny models and datasets that training is tested with."""

from tests.training.conftest import datasets, trainables

__all__ = ["datasets", "trainables"]
