"""Evaluation of a converted diffusion model against the original: how good (distances, alignment, pairs), how fast."""
