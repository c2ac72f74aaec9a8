"""What is measured: one task a file."""
