"Start a script in several processes of torchrun, as the tests of training in processes do."

import os
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
ENV = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(REPO), "CUDA_VISIBLE_DEVICES": ""}


def launch(*args, n=2, wait=True):
    "Run `torchrun args` in `n` processes and return the output. With `wait=False` return the running process."
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={n}",
        "--rdzv_backend=c10d",
        "--rdzv_endpoint=localhost:0",
        *map(str, args),
    ]
    p = subprocess.Popen(
        command, env=ENV, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    if not wait:
        return p
    out = p.communicate(timeout=300)[0]
    assert p.returncode == 0, out
    return out
