"""The search page and its API (`eclip serve`)."""
