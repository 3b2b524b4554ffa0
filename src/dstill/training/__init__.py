"""The only loop that trains a network, and the checkpoint from which an interrupted training resumes.

The callers decide what is trained and on which data.
"""
