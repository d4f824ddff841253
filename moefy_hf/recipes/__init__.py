"""What `moefy train` and the scripts in recipes/ run: arguments, data, stages, trainings, measurements, publishing.

`datasets` and `evaluate` are imported by modules of this folder only.
"""
