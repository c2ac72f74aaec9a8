"""Tars of samples: scanned once, read at random."""
