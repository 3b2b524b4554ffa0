"""Files that dstill writes and reads back: sets, results, run folders, pictures, exports.

Every file is written whole or not at all, and nothing in a file is ever executed. What a run computes is elsewhere.
"""
