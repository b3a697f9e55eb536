"""A staged trial of a model: is ``backend="prescore"`` to be adopted?"""

from .trial import trial
from .verdict import Stage, Verdict

__all__ = ["Stage", "Verdict", "trial"]
