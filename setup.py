"""Installs what settings.ini describes; nothing is said twice here."""

import re
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]

extras = {
    key.removesuffix("_requirements"): value.split() for key, value in cfg.items() if key.endswith("_requirements")
}
pictures = [requirement for requirement in extras["notebook"] if requirement.startswith("matplotlib")]
# an extra works alone: what uses its packages is the trainer's, a student is saved as safetensors, loggers draw
for name in ("notebook", "parquet", "segmentation", "detection", "datasets", "hub", "export"):
    extras[name] += extras["train"]
for name in ("tensorboard", "wandb", "mlflow"):
    extras[name] += extras["train"] + pictures
extras["slurm"] += extras["notebook"]
for name in ("slurm", "parquet", "segmentation", "detection", "datasets"):
    extras["dev"] += extras[name]
extras["docs"] += extras["dev"]


class BuildWithNotebooks(build_py):
    "The benchmark notebooks travel in the package, so that `rcka run` and `rcka sweep` work without a checkout."

    def run(self):
        super().run()
        if not self.editable_mode:  # an editable installation runs those of its checkout
            folder = Path(self.build_lib, "rcka", "notebooks")
            shutil.rmtree(folder, ignore_errors=True)  # build/ may hold those of an earlier build
            folder.mkdir(parents=True)
            for notebook in sorted((here / "nbs" / "benchmarks").glob("*.ipynb")):
                shutil.copyfile(notebook, folder / notebook.name)


def description() -> str:
    "The README for a package index, which has no files beside it: links and images lead to the repository."
    base = {"": f"{cfg['git_url']}/blob/{cfg['branch']}/", "!": f"{cfg['git_url']}/raw/{cfg['branch']}/"}
    link = re.compile(r"(!?)(\[[^\]]*\])\((?![a-z]+:|#)([^)\s]+)\)")
    return link.sub(
        lambda found: f"{found[1]}{found[2]}({base[found[1]]}{found[3]})",
        (here / "README.md").read_text(encoding="utf-8"),
    )


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=description(),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    license="Apache-2.0",
    keywords=cfg["keywords"],
    url=cfg["git_url"],
    project_urls={
        "Documentation": cfg["doc_host"] + cfg["doc_baseurl"],
        "Issues": f"{cfg['git_url']}/issues",
        "Changelog": f"{cfg['git_url']}/blob/{cfg['branch']}/CHANGELOG.md",
        "Paper": "https://arxiv.org/abs/2401.11824",
    },
    packages=find_packages(include=["rcka", "rcka.*"]),
    package_data={"rcka": ["py.typed", "**/*.csv", "weights/*"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    cmdclass={"build_py": BuildWithNotebooks},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Natural Language :: English",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in (10, 11, 12, 13)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    entry_points={
        "console_scripts": [cfg["console_scripts"]],
        "papermill.engine": ["rcka=rcka.engine:engine"],
        "nbdev": ["rcka=rcka._modidx:d"],
    },
    zip_safe=False,
)
