"""Requests in, tokens out: the scheduler, its plan, and the loop around them."""
