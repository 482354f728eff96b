"`python -m rcka.data`: list the datasets, or fetch and check one."

import sys

from .datasets import main

sys.exit(main())
