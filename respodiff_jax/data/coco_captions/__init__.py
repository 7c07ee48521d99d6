"""Captions of COCO-30k as a `tensorflow_datasets` data set."""
