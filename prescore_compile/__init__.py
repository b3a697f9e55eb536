"""``torch.compile(model, backend="prescore")``: attention that ranks its keys first."""

from __future__ import annotations

from pathlib import Path as _Path

_ROOT = _Path(__file__).resolve().parent.parent
if (_ROOT / "kernels" / "attend.cpp").is_file() and not (_Path(__file__).parent / "kernels").exists():
    # Run from a checkout: `kernels` and `passes` lie beside this folder, not inside it.
    __path__.append(str(_ROOT))

from .adoption import Stage, Verdict, trial  # noqa: E402
from .attention import attention  # noqa: E402
from .backend import explain, prescore  # noqa: E402
from .calibration import calibrate  # noqa: E402
from .inspection import Inspection, graph_diff  # noqa: E402
from .kernels.plan import OptionError, Plan  # noqa: E402
from .passes import Calibration, Config, Report, SiteReport  # noqa: E402
from .passes.stages import observe  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "Calibration",
    "Config",
    "Inspection",
    "OptionError",
    "Plan",
    "Report",
    "SiteReport",
    "Stage",
    "Verdict",
    "__version__",
    "attention",
    "calibrate",
    "explain",
    "graph_diff",
    "observe",
    "prescore",
    "trial",
]
