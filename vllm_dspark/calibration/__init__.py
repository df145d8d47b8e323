"""How far confidences can be trusted, and their correction (paper, 3.2.1).

Numpy only, so that a server can read a calibration without further packages; plots
import matplotlib when they are drawn.
"""
