"""The networks: the DiT, its attention, the chunked vocabulary head, and the bundle of weights that users hold."""
