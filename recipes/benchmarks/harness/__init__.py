"""What the benchmark scripts share: their command line, their results on disk, their models, data and training."""
