"""The engine in virtual time: traces, hardware, and a replay through the real scheduler."""
