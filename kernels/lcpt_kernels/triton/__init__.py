"""Squared attention in Triton: a kernel and its launch a file; `squared.py` is the algorithm that calls them."""
