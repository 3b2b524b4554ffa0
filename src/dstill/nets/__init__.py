"""Networks by name, and what is read of them: features and maps.

Derivatives written by hand are in `derivatives`, training is in `training`.
"""
