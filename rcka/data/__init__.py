"Datasets, in memory and from files, as batches. Written by hand; the modules are exported from nbs/method."

from .datasets import dataset, list_datasets, load_dataset
from .memory import Batches, Dataset

__all__ = ["Batches", "Dataset", "dataset", "list_datasets", "load_dataset"]
