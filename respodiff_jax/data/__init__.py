"""Prompt sets and concepts files, and their `tensorflow_datasets` builders without TensorFlow."""
