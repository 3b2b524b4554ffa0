"""Helpers for every room: console, devices, seeds, signals, worker processes, plugins and tables of text.

Nothing here knows about images, networks or methods.
"""
