"""Training: configs, runs and waves of runs on devices, checkpoints, logs."""
