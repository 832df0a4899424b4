"""The ground floor that every other package may use: files, hashes, errors, provenance, memory."""
