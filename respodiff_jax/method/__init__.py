"""The paper: RAM and SAM, the objective, the rollout, one training step. Pure functions."""
