"""The command line: ``hfq quantize | eval | inspect | explain | doctor | push``.

Exit codes: 0 success, 1 failure (one line on stderr says why), 2 bad usage. With ``--json`` stdout carries one JSON
object and nothing else.
"""

from .program import main

__all__ = ["main"]
