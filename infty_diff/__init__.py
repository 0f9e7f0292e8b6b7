"""∞-Diff from Python: `from infty_diff import InftyDiff, SamplingOptions`.

PyTorch is imported with the first name that is asked for, not with the package.
"""

import importlib

__version__ = "0.2.0"

_HOMES = {
    "InftyDiff": "infty_diff.model",
    "SamplingOptions": "infty_diff.sampling",
    "InpaintOptions": "infty_diff.editing",
    "to_pil": "infty_diff.images",
    "to_uint8": "data.pixels",
    "Sensors": "diffusion.sensors",
    "WrappedImages": "data.wrapped",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
