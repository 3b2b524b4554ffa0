"""What every room may use: console, devices, seeds, signals, worker processes, plugins, tables of text.

Nothing here knows of images, networks or methods.
"""
