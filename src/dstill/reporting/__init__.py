"""Figures and the HTML page, drawn from what `artifacts` holds.

Nothing here computes a result.
"""
