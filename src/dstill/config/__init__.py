"""Settings: their types, the table of methods, YAML files, and recipes.

Nothing here imports torch when it is imported. What a setting does is in the room that reads it.
"""
