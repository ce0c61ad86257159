"""Calibration and evaluation text: by name, file, folder or from the running Python, cut into windows."""
