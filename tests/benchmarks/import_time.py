"""How long importing the package takes after torch and geotorch; the median of nine processes."""

import statistics
import subprocess
import sys

PROGRAM = """
import time, geotorch, torch
start = time.perf_counter()
import orthoconv_param
print(time.perf_counter() - start)
"""
times = [float(subprocess.check_output([sys.executable, "-c", PROGRAM])) for _ in range(9)]
print(f"{1e3 * statistics.median(times):.0f} ms")
