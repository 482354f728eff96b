"""Knowledge distillation by centred kernel alignment.

Losses for your own loop: `fcka`, `lcka`, `pcka`; methods: `RCKA`, `PCKA`, `create_method`; features of any network:
`Taps`. These need only torch and torchvision. The trainer (`rcka.train`, `rcka.experiments`) and the command `rcka`
need more packages: see `EXTRAS`."""

__version__ = "0.1.0"

from importlib import import_module
from typing import TYPE_CHECKING

from rcka.extras import EXTRAS, optional_import

if TYPE_CHECKING:  # at run time each name is imported when it is first asked for: `rcka --help` must not wait for torch
    from rcka.core import FeaturePaths, Outputs
    from rcka.data import list_datasets, load_dataset
    from rcka.distillation import distill
    from rcka.experiments import Experiment, Result, published, run, run_many, summary
    from rcka.features import Taps, feature_paths
    from rcka.methods import FCKA, LCKA, PCKA, RCKA, Method, create_method, fcka, lcka, list_methods, pcka, register
    from rcka.pair import Pair
    from rcka.models import create_model, list_models, load_checkpoint, load_student, save_weights, student_transform
    from rcka.shipping import export_student, push_to_hub
    from rcka.similarity import Gaussian, Linear, Polynomial, center, cka, gram, hsic, mmd2
    from rcka.train import Callback, Distiller, TrainConfig, Trainer, load_teacher, save_teacher

_HOMES = {  # the public names, by the module that has them
    "core": ("FeaturePaths", "Outputs"),
    "methods": (
        *("FCKA", "LCKA", "PCKA", "RCKA", "fcka", "lcka", "pcka"),
        *("Method", "create_method", "list_methods", "register"),
    ),
    "models": ("create_model", "list_models", "load_checkpoint", "load_student", "save_weights", "student_transform"),
    "similarity": ("Gaussian", "Linear", "Polynomial", "center", "cka", "gram", "hsic", "mmd2"),
    "features": ("Taps", "feature_paths"),
    "pair": ("Pair",),
    "data": ("list_datasets", "load_dataset"),
    "train": ("Callback", "Distiller", "TrainConfig", "Trainer", "load_teacher", "save_teacher"),
    "distillation": ("distill",),
    "shipping": ("export_student", "push_to_hub"),
    "experiments": ("Experiment", "Result", "published", "run", "run_many", "summary"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["EXTRAS", "optional_import", *_HOME_OF]  # noqa: PLE0604  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str):
    if name in _HOMES:
        return import_module(f"rcka.{name}")
    if name in _HOME_OF:
        globals()[name] = getattr(import_module(f"rcka.{_HOME_OF[name]}"), name)
        return globals()[name]
    raise AttributeError(f"module 'rcka' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *_HOME_OF, *_HOMES})
