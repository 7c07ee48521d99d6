"""The WinoBias protocol's prompts as a `tensorflow_datasets` data set."""
