"""What the scripts in recipes/ share: their arguments, data, stages, trainings, measurements and publishing.

`datasets` and `evaluate` are imported by modules of this folder only.
"""
