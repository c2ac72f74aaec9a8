"""What a reader of shards raises when the data, not one image of it, is at fault."""


class DataError(ValueError):
    """A tar that changed or cannot be read, a worker that was killed, a loader that stalls: one line for the user."""
