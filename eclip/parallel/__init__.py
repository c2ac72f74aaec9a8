"""The processes of a run: how they meet, share the work, watch each other, are told to stop, and end."""
