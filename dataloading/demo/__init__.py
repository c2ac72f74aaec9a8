"""The embedded catalogue: 172 real products (CC0) composed into scenes, packed into train, val and test shards."""
