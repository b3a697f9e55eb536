"""Run what Triton compiled for an NVIDIA GPU, on a CPU: a machine for PTX, as Triton writes it for sm_80.

Triton's interpreter runs a kernel's source and its compiler is only trusted to translate it. Here the translation
itself runs: layouts, shared memory, shuffles, the fragments of tensor-core instructions, predicated loads. All programs
of a launch run side by side, each instruction once for all of their lanes (NumPy).
"""
