"""The unrolled gradient: a student as pure functions, its steps, and the derivative through all of them.

This room knows nothing of data sets, files or methods.
"""
