"""The outer loop that every method shares, and what is written to the run folder meanwhile.

What one iteration does is in `methods`.
"""
