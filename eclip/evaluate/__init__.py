"""Transfer without fine-tuning: classification, retrieval and grounding of one run (`python -m eclip.evaluate`)."""
