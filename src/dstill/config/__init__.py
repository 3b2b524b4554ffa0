"""Settings: their types, the table of methods, YAML files, and recipes.

Importing this room does not import torch. What a setting does is in the room that reads it.
"""
