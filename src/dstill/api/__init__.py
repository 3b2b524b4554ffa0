"""What `dstill.<verb>` is: run, distill, train_experts, evaluate, judge, compare, tune.

Each function resolves a `Job` once and hands it down. How a method distils or a network is measured is in the rooms below;
what a command prints is in `cli`.
"""
