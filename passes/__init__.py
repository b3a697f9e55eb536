"""Graph work: find sites, lift masks, decide, insert. Usable alone on any GraphModule."""

from .config import Config
from .find import find
from .reasons import REASONS
from .report import Report, SiteReport
from .rewrite import rewrite
from .site import Attention, Site

__all__ = ["REASONS", "Attention", "Config", "Report", "Site", "SiteReport", "find", "rewrite"]
