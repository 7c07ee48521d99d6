"""Pictures: choosing the concepts of each picture, sampling, and writing folders."""
