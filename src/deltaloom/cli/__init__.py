"""The command line.

Python looks for garbage every few hundred new objects, and a start makes half a million that stay:
a tenth of its time. So it looks seldom until work on tensors begins (`main.py`).
"""

import gc

OFTEN = gc.get_threshold()
gc.set_threshold(50_000, *OFTEN[1:])
