"Real images for tests that train: a few hundred of cifar10-jpeg, or the digits of scikit-learn where it is not at hand."

import os
import tarfile
from pathlib import Path

import pytest

from rcka.data import data_root, load_dataset

REPO = Path(__file__).parent.parent


def place(folder, name, data):
    "Image NNNN of a part and class into `folder`, as a link or as bytes."
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(data, bytes):
        path.write_bytes(data)
    else:
        os.symlink(data, path)


def wanted(name, train=20, test=10):
    part, number = name.split("/")[0], Path(name).stem
    return number.isdigit() and int(number) < {"train": train, "test": test}.get(part, 0)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    "200 training and 100 test images in ten classes, as `load_dataset` gives them."
    folder, real = tmp_path_factory.mktemp("data") / "few", data_root() / "cifar10-jpeg"
    archive = REPO.parent / "shared" / "data" / "cifar10-jpeg.tar.xz"  # where .ci/run looks too
    if real.is_dir():
        for path in real.glob("*/*/00??.jpg"):
            if wanted(name := str(path.relative_to(real))):
                place(folder, name, path.resolve())
    elif archive.is_file():
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.isfile() and wanted(member.name):
                    place(folder, member.name, tar.extractfile(member).read())
    else:
        return load_dataset("digits", limit=200, test_limit=100)
    return load_dataset(f"imagefolder:{folder}", root=folder.parent)
