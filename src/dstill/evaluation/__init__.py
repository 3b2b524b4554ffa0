"""The measurement of accuracies: protocols, fresh networks, and the baselines beside every result.

`api` decides which sets are measured and what is written.
"""
