"""Graph work: find sites, lift masks, decide, insert. Usable alone on any GraphModule."""

from .config import Config
from .diff import GraphDiff, diff
from .find import find
from .plans import Calibration, SitePlan
from .reasons import REASONS
from .report import Report, SiteReport
from .rewrite import rewrite
from .site import Attention, Site
from .snapshot import Snapshot, snapshot

__all__ = [
    "REASONS",
    "Attention",
    "Calibration",
    "Config",
    "GraphDiff",
    "Report",
    "Site",
    "SitePlan",
    "SiteReport",
    "Snapshot",
    "diff",
    "find",
    "rewrite",
    "snapshot",
]
