"""Inappropriate Image Prompts as a `tensorflow_datasets` data set."""
