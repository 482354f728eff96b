"`python -m rcka.train`: one experiment without a notebook, also under torchrun."

import sys

from rcka.experiments.launch import main

sys.exit(main())
