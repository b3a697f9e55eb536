"""Attention on a GPU, stage by stage, against every backend of SDPA and against FlexAttention.

`python -m bench.attention --device cuda` runs it; `--dry-run` takes the same path on a CPU with
Triton's interpreter and tiny sizes, and its times mean nothing. Each way's result is compared with a
float32 reference before it is timed; a way that fails the check, or that the machine has not, gets no
time and says why. What a case's time does not suffice for is left out, the least telling last.
"""
