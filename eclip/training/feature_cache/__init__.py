"""Outputs of locked towers, computed once into a memory map and trained from."""
