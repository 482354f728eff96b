"What a stranger meets first: the import with torch alone, the README's code, the metadata."

import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

root = Path(__file__).parent.parent
settings = configparser.ConfigParser(delimiters=["="])
settings.read(root / "settings.ini")
cfg = settings["DEFAULT"]


def python(code):
    return subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)


def test_import_needs_torch_and_torchvision_alone():
    "Everything the extras bring is made impossible to import; the losses, networks and taps still work."
    names = [re.split(r"[<>=!]", r)[0] for key in cfg if key.endswith("_requirements") for r in cfg[key].split()]
    blocked = [{"scikit-learn": "sklearn"}.get(n, n).replace("-", "_") for n in names] + [
        "IPython",
        "ipykernel",
        "fastcore",
    ]
    done = python(f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}: raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import torch, rcka
student, teacher = rcka.create_model("resnet8", 10), rcka.create_model("resnet14", 10)
s, t = (rcka.Taps(m, ["layer3"]) for m in (student, teacher))
x = torch.randn(8, 3, 32, 32)
sum(rcka.RCKA()(s(x), t(x), torch.arange(8)).values()).backward()
print(len(rcka.list_methods()))
""")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 5


@pytest.mark.parametrize("first", ["papermill", "rcka.engine", "rcka.sweep", "rcka.cli"])
def test_papermill_and_its_engine_import_in_any_order(first):
    "papermill loads the engine of an installed rcka while it is itself being imported."
    done = python(
        f"import {first}, papermill.engines, rcka.sweep; print(papermill.engines.papermill_engines.get_engine('rcka').__class__.__module__)"
    )
    assert done.stdout.strip() == "rcka.engine", done.stderr


def test_readme_loop_runs():
    (code,) = [
        c for c in re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(), re.S) if "rcka.RCKA" in c
    ]
    code = code.replace('weights="IMAGENET1K_V1"', "weights=None")  # the weights need a download
    torch.manual_seed(0)
    loader = [(torch.randn(4, 3, 64, 64), torch.arange(4)) for _ in range(2)]
    names = {"loader": loader}
    exec(code, names)
    assert set(names["terms"]) == {"ce", "fcka", "lcka_intra", "lcka_inter"}
    assert all(p.grad is not None for p in names["student"].parameters())
    assert all(p.grad is None for p in names["teacher"].parameters())


def test_readme_links_exist():
    for page in ("README.md", "data/README.md"):
        for link in re.findall(r"\]\(([^)#]+)\)", (root / page).read_text()):
            assert link.startswith("http") or (root / page).parent.joinpath(link).exists(), f"{page} links to {link}"


def test_version_is_said_once():
    import rcka

    assert rcka.__version__ == cfg["version"]
    assert f"version: {cfg['version']}" in (root / "CITATION.cff").read_text()
