"""Optional packages, and the extra of this package that installs each.

Imports nothing but the standard library, so that it can report any missing package."""

from contextlib import contextmanager

EXTRAS = {  # the extra that installs each optional package, by its import name
    "accelerate": "train",
    "filelock": "train",
    "pandas": "train",
    "safetensors": "train",
    "scipy": "train",
    "sklearn": "train",
    "tqdm": "train",
    "matplotlib": "notebook",
    "nbformat": "notebook",
    "papermill": "notebook",
    "rich": "notebook",
    "seaborn": "notebook",
    "typer": "notebook",
    "pyarrow": "parquet",
    "timm": "timm",
    "transformers": "transformers",
    "datasets": "datasets",
    "huggingface_hub": "hub",
    "onnx": "export",
    "onnxscript": "export",
    "onnxruntime": "export",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "torchmetrics": "segmentation",
    "faster_coco_eval": "detection",
    "submitit": "slurm",
}


@contextmanager
def optional_import():
    "Wrap imports of optional packages: if one is missing, raise an ImportError that says what to install."
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRAS:
            raise
        raise ImportError(
            f"this part of rcka needs {missing}: "
            f"pip install 'rcka[{EXTRAS[missing]}] @ git+https://github.com/rcka/rcka'",
            name=error.name,
        ) from None
