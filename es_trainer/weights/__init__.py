"""The weights that are trained: where they lie, their masters, and how a member gets in and out."""
