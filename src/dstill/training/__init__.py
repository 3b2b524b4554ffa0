"""The only loop that trains a network, and the checkpoint that a training resumes from.

What is trained, and on what, the caller says.
"""
