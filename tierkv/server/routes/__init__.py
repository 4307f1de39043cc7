"""One module for each API: a router over a `ServerContext`."""
