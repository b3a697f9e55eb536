"""Maths: the reference, scorers, clusters, and what they are lowered to."""

# Started from a checkout's root, Python finds this folder under the name of PyPI's `kernels`, for
# which transformers looks: a version too old for it to use says that this is not that package.
__version__ = "0"
