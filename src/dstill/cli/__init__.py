"""The command line: one module for each group of commands, and the text that they print.

A command that makes or measures something is the public function of the same name. Importing this room never imports torch.
"""
