"""Installs what settings.ini describes; nothing is said twice here."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]

extras = {
    name: cfg[f"{name}_requirements"].split()
    for name in ("train", "notebook", "segmentation", "detection", "slurm", "dev", "docs")
}
extras["notebook"] += extras["train"]
extras["segmentation"] += extras["train"]
extras["detection"] += extras["train"]
extras["slurm"] += extras["notebook"]
extras["dev"] += extras["slurm"] + extras["segmentation"] + extras["detection"]
extras["docs"] += extras["dev"]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    license="Apache-2.0",
    keywords=cfg["keywords"],
    url=cfg["git_url"],
    packages=find_packages(include=["rcka", "rcka.*"]),
    package_data={"rcka": ["**/*.csv"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Natural Language :: English",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    entry_points={
        "console_scripts": [cfg["console_scripts"]],
        "papermill.engine": ["rcka=rcka.engine:engine"],
        "nbdev": ["rcka=rcka._modidx:d"],
    },
    zip_safe=False,
)
