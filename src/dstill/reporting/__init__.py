"""The figures and the HTML page of a run, made from the records in `artifacts`.

Nothing here computes a result.
"""
