"""The files that dstill writes and reads back: sets, results, run folders, pictures and exports.

Every file is written completely or not at all, and nothing in a file is ever executed. The computations are elsewhere.
"""
