"""How accuracies are measured: protocols, fresh networks, and the baselines beside every result.

Which sets are measured and what is written is in `api`.
"""
