"""Knowledge distillation by centred kernel alignment.

Losses for a loop of your own: `fcka`, `lcka`, `pcka`; as methods: `RCKA`, `PCKA`, `create_method`; features of any network: `Taps`.
Needs torch and torchvision alone. The trainer (`rcka.trainer`, `rcka.experiments`) wants `pip install 'rcka[train]'`."""

__version__ = "0.1.0"

import rcka.baselines  # their methods go by name
import rcka.baselines_dense
import rcka.baselines_features
from rcka.losses import (
    FCKA,
    LCKA,
    PCKA,
    RCKA,
    Layers,
    Method,
    Outputs,
    create_method,
    fcka,
    lcka,
    list_methods,
    pcka,
    register,
)
from rcka.models import create_model, list_models, load_checkpoint, save_weights
from rcka.similarity import Gaussian, Linear, Polynomial, center, cka, gram, hsic, mmd2
from rcka.taps import Taps, layers_of

_LATER = {  # imported when asked for: these need more than torch, or take longer
    "load_dataset": "rcka.data", "list_datasets": "rcka.data",
    "Experiment": "rcka.experiments", "Result": "rcka.experiments", "run": "rcka.experiments", "summary": "rcka.experiments", "published": "rcka.experiments",
}


def __getattr__(name):
    if name not in _LATER:
        raise AttributeError(f"module 'rcka' has no attribute {name!r}")
    from importlib import import_module

    try:
        return getattr(import_module(_LATER[name]), name)
    except ModuleNotFoundError as e:
        raise ImportError(f"rcka.{name} needs {e.name}, which comes with: pip install 'rcka[train]'") from e


def __dir__(): return sorted([*globals(), *_LATER])
