"""Counting the instructions of the CPU kernels and of calls: count.py is the command."""
