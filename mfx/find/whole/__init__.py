"""Blocks that are taken whole: modules that the caller named, and layers with all their residual adds."""
