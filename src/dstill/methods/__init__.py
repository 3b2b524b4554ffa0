"""Distillation methods, one file each, with their settings.

`base` is the interface. The outer loop is in `distillation`, and the table of methods is in `config.registry`.
"""
