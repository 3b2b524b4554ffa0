"""The unrolled gradient: a student as pure functions, its steps, and the derivative through all of them.

This room knows nothing about data sets, files or methods.
"""
