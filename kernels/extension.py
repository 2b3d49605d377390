"""Is the compiled half, fuseer.kernels._C, here, and if not, why not?"""

from pathlib import Path

import torch  # noqa: F401  the extension links against libtorch, which must be in the process first

REASON_FILE = Path(__file__).with_name("_C_reason.txt")


def _load():
    try:
        import fuseer.kernels._C as module
    except ModuleNotFoundError:
        if REASON_FILE.exists():
            return None, f"the C++ extension was not built: {REASON_FILE.read_text(encoding='utf-8').strip()}"
        return None, "the C++ extension was never built; run pip install --no-deps --no-build-isolation -e ."
    except ImportError as error:
        return None, f"the C++ extension does not load ({error}); rebuild it against torch {torch.__version__}"
    return module, None


_MODULE, _REASON = _load()


def load():
    """The module fuseer.kernels._C, loaded once with this file, or None."""
    return _MODULE


def reason():
    """Why `load()` gives None, as one sentence with a remedy; None where the extension is loaded."""
    return _REASON
