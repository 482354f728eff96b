"""Optional packages, and the extra of this package that installs each.

Needs nothing but Python, so that a missing package can be named at once."""

from contextlib import contextmanager

EXTRAS = {  # what is optional, by the name one imports, and the extra that brings it
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
    "Wrap imports of optional packages: where one is missing, ImportError says what to install."
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
