"""`respodiff bench`: speed, FLOPs, memory and compile time, beside PyTorch's in the same run."""
