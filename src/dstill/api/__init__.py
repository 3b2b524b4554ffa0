"""The functions of the package: run, distill, train_experts, evaluate, judge, leaderboard, compare, tune.

Each function resolves a `Job` (in `jobs`) once and passes it on. How a method distils and how a network is measured is in the
rooms below; what a command prints is in `cli`.
"""
