"""Knowledge distillation by centred kernel alignment.

Losses for a loop of your own: `fcka`, `lcka`; as methods: `RCKA`, `create_method`; features of any network: `Taps`.
Needs torch and torchvision alone. The trainer (`rcka.trainer`, `rcka.experiments`) wants `pip install 'rcka[train]'`."""

__version__ = "0.1.0"

from rcka.similarity import Gaussian, Linear, Polynomial, center, cka, gram, hsic, mmd2
from rcka.losses import FCKA, LCKA, RCKA, Layers, Method, Outputs, create_method, fcka, lcka, list_methods, register
from rcka.baselines import KD
from rcka.taps import Taps, layers_of
from rcka.models import create_model, list_models, load_checkpoint, save_weights
from rcka.data import list_datasets, load_dataset
