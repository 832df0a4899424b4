"""Provide what every other package may use: files, hashes, errors, provenance, memory."""
