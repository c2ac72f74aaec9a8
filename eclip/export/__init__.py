"""A trained model for others: one folder with weights, settings, tokenizer and card; towers for transformers; ONNX."""
