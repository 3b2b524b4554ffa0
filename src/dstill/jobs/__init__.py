"""A command before its work begins: its options, the job they resolve to, and the checks at the start.

What is done with a job is in `api`; what it would take, in `planning`.
"""
