"""Networks by name, and their features and feature maps.

Hand-written derivatives are in `derivatives`, training is in `training`.
"""
