"""What a model learns from: one objective a file, and what objectives share."""
