"""The command line: one module for each group of commands, and the text that they print.

Every command that makes or measures something calls the public function of the same name. Importing this room does not
import torch.
"""
