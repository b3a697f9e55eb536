"""Maths: the reference, scorers, clusters, and what they are lowered to."""
