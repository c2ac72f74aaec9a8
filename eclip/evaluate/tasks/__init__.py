"""What is measured: one task a file, each with `run(evaluator, split)`; run.py names them in their order."""
