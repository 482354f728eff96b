"""Knowledge distillation by centred kernel alignment.

Losses for a loop of your own: `fcka`, `lcka`, `pcka`; as methods: `RCKA`, `PCKA`, `create_method`; features of any network: `Taps`.
Needs torch and torchvision alone. The trainer (`rcka.trainer`, `rcka.experiments`) and the command `rcka` need more: see `EXTRAS`."""

__version__ = "0.1.0"

from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # at run time each name is imported when it is first asked for: `rcka --help` must not wait for torch
    from rcka.data import list_datasets, load_dataset
    from rcka.experiments import Experiment, Result, published, run, summary
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

__all__ = [
    "EXTRAS",
    "optional_import",
    # losses
    "FCKA",
    "LCKA",
    "PCKA",
    "RCKA",
    "Layers",
    "Method",
    "Outputs",
    "create_method",
    "fcka",
    "lcka",
    "list_methods",
    "pcka",
    "register",
    # models
    "create_model",
    "list_models",
    "load_checkpoint",
    "save_weights",
    # similarity
    "Gaussian",
    "Linear",
    "Polynomial",
    "center",
    "cka",
    "gram",
    "hsic",
    "mmd2",
    # taps
    "Taps",
    "layers_of",
    # data
    "list_datasets",
    "load_dataset",
    # experiments, which need rcka[train]
    "Experiment",
    "Result",
    "published",
    "run",
    "summary",
]

# where the names above are looked for, in this order; and the modules that `import rcka` is enough for
_HOMES = ("losses", "models", "similarity", "taps", "data", "experiments")
_MODULES = ("losses", "models", "similarity", "taps", "baselines", "baselines_dense", "baselines_features")


def __getattr__(name: str):
    if name in _MODULES:
        return import_module(f"rcka.{name}")
    if name in __all__:
        for home in _HOMES:
            if hasattr(module := import_module(f"rcka.{home}"), name):
                globals()[name] = getattr(module, name)
                return globals()[name]
    raise AttributeError(f"module 'rcka' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__, *_MODULES})


EXTRAS = {  # what is optional, by the name one imports, and the extra that brings it
    "accelerate": "train",
    "filelock": "train",
    "pandas": "train",
    "safetensors": "train",
    "sklearn": "train",
    "tqdm": "train",
    "matplotlib": "notebook",
    "nbformat": "notebook",
    "papermill": "notebook",
    "rich": "notebook",
    "seaborn": "notebook",
    "typer": "notebook",
    "pyarrow": "parquet",
    "torchmetrics": "segmentation",
    "faster_coco_eval": "detection",
    "submitit": "slurm",
}


@contextmanager
def optional_import():
    "Around imports of optional packages: where one is missing, ImportError says what to install."
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRAS:
            raise
        raise ImportError(
            f"this part of rcka needs {missing}: pip install 'rcka[{EXTRAS[missing]}] @ git+https://github.com/rcka/rcka'",
            name=error.name,
        ) from None
