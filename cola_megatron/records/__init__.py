"""What a run folder says of its run: config, provenance, metrics, progress, starts, how it ended."""
