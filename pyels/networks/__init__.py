"""Networks as denoisers: pyels' own and other people's, on disk and in training."""
