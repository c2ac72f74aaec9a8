"""From rows and images to shards: what is accepted, how it is split, and how shards replace older ones together."""
