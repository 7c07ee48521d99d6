"""Evaluation: fairness, quality and safety of a model and of an adapter on it, and the report."""
