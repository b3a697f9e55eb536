"""Graph work: find sites, lift masks, decide, insert. Usable alone on any GraphModule."""

from .config import Config
from .find import Site, find
from .reasons import REASONS
from .report import Report, SiteReport
from .rewrite import rewrite

__all__ = ["REASONS", "Config", "Report", "Site", "SiteReport", "find", "rewrite"]
