"""RespoDiff in JAX: responsible text-to-image generation with a frozen Stable Diffusion."""
