"""What safekern costs beside plain PyTorch: the cases that ``safekern bench`` and ``pytest benchmarks`` both run.

A case is built for a dtype, a number of elements and a ratio, checks that safekern's result is right, and only then is
timed: safekern and its baselines take turns in one process. ``cases`` defines them, ``baselines`` holds what they are
compared with, ``measure`` times, ``results`` makes, writes, reads and compares rows, ``figures`` draws them, ``memory``
measures whole processes.
"""
