"""The paper's tables and figures, and experiments beside them: their files, their runs, and their pages.

Every row is an ordinary run of `api`.
"""
