"""Prompt sets: their CSV layouts, and `tensorflow_datasets` builders that need no TensorFlow."""
