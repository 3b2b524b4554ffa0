"""The outer loop that every method shares, and what a run folder receives on the way.

What one iteration does is in `methods`.
"""
