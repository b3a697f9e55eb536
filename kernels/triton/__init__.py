"""Kernels for GPUs: Triton source written for one plan, and what launches it. See docs/triton.md.

| module | holds |
| --- | --- |
| ``spec`` | what the source of a kernel depends on |
| ``render`` | templates filled to source text |
| ``cache`` | source text to a kernel that can be launched |
| ``maths`` | lifted masks and biases as Triton expressions |

Importing this package imports neither Triton nor torch.
"""
