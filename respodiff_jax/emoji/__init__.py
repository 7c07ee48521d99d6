"""Emoji World: a small world of pictures with known biases, and a diffusion model of it."""
