"""Noise as a pure function of seed, parameter name and index, and the shapes that perturbations have."""
