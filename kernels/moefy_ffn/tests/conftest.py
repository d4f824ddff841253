"""Triton's kernels run in its interpreter where there is no GPU; it asks when it is first imported, so it is told here."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
