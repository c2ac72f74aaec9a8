"""Weights from elsewhere: safetensors of other programs into our towers."""
