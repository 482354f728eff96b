"""A notebook that stands in for a benchmark: it leaves the files of a run without importing torch, so that a kernel
takes a second. Seeds decide what happens: 0 to 9 succeed, 66 raises, 77 kills its kernel, 88 finds the disk full."""

import nbformat

from rcka.experiments.experiment import Experiment
from rcka.experiments.result import RESULT_FORMAT

RUN = """
import json, os, signal, time
from pathlib import Path
from filelock import FileLock

wanted = {k: globals()[k] for k in json.loads(os.environ["STUB_FIELDS"])}
found = Path(os.environ["RCKA_RUNS"]).glob("*/experiment.json")
folder = next(p.parent for p in found if json.loads(p.read_text()) == wanted)
with FileLock(folder / ".lock"):
    with open(folder / "starts", "a") as f: f.write(f"{os.getpid()}\\\\n")
    if seed == 66: raise ValueError("this seed brings bad luck")
    if seed == 77: os.kill(os.getpid(), signal.SIGKILL)
    if seed == 88: raise OSError(28, "No space left on device")
    rows = (folder / "metrics.csv").read_text().splitlines() if (folder / "metrics.csv").exists() else ["epoch"]
    for epoch in range(len(rows), epochs + 1):  # goes on where it was
        time.sleep(float(os.environ.get("STUB_SECONDS", 0)))
        rows.append(str(epoch))
        (folder / "metrics.csv").write_text("\\\\n".join(rows) + "\\\\n")
        with open(folder / "epochs", "a") as f: f.write(f"{epoch}\\\\n")
    score = {"epoch": epochs, "top1": 50.0 + seed, "top5": 90.0}
    result = {"experiment": wanted, "last": score, "best": score, "train": {}, "teacher": score if teacher else None,
              "parameters": 1, "seconds": 1.0, "images_per_second": 64.0, "device": "none", "versions": {},
              "commit": None, "finished": "2026-01-01T00:00:00+00:00", "format": RESULT_FORMAT}
    (folder / "result.json").write_text(json.dumps(result))
""".replace("\\\\n", "\\n").replace("RESULT_FORMAT", str(RESULT_FORMAT))


def write_stub(path, more: str = ""):
    "Write the notebook; `more` is code at its end."
    fields = Experiment().to_dict()
    cell = nbformat.v4.new_code_cell(
        "\n".join(f"{k} = {v!r}" for k, v in fields.items()), metadata={"tags": ["parameters"]}
    )
    nb = nbformat.v4.new_notebook(cells=[cell, nbformat.v4.new_code_cell(RUN), nbformat.v4.new_code_cell(more)])
    nb.metadata["kernelspec"] = {"name": "python3", "display_name": "python3", "language": "python"}
    nbformat.write(nb, path)
    return path
