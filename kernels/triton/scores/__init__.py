"""Score on a GPU: one program a chunk reads its keys once and scores them on chip.

| module | holds |
| --- | --- |
| ``kernel`` | what a source depends on, which chunks fit, the frame of a kernel, its launch |
| ``centres`` | k-means and k-median |
| ``leverage`` | leverage, by a blocked Cholesky factor |
| ``attention`` | peak and query: attention inside the chunk |
| ``products`` | float32 products on tensor cores |
| ``select`` | each chunk's best keys, of scores of any method |
"""
