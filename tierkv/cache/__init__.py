"""Where KV is: blocks, the prefix tree over them, and who holds which copy."""
