"""Concepts to train as a `tensorflow_datasets` data set."""
