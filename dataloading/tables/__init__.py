"""Tables of shops: CSV and JSON lines of any dialect, their columns understood, to rows of products."""
