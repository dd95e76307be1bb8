"""Lists of similar windows, which engine "sampled" looks into: what they are, how they are built, and their file."""
