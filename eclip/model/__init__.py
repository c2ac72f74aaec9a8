"""The two encoders, the instance decoder and the model that joins them."""
