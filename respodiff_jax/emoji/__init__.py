"""Emoji World: a small, biased, exactly known world of pictures, and a diffusion model of it."""
