"""Per-site plans: measure what each site's approximation does to the model's output, and choose."""

from .calibrate import calibrate

__all__ = ["calibrate"]
