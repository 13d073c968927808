"""What bench.py measures on any device, how it is timed, and the goals."""
