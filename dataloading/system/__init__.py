"""What commands and workers need of the system: streams, one-line errors, locks, processes that die with a parent."""
