"""Distances between two sets of features: one file each, plain functions of tensors."""
