"The numbers that the package had before it was rebuilt: see golden.py, which compares them bit for bit on one machine."

import json

import golden
import pytest
import torch

pytestmark = pytest.mark.slow
KNOWN = json.loads(golden.FILE.read_text(encoding="utf-8"))
DRAWN = ("crd", "mgd", "dpk")  # draw random numbers, which torch does not promise to keep from version to version


def near(found: dict, known: dict, rel: float):
    assert found.keys() == known.keys()
    for name, value in known.items():
        assert found[name] == pytest.approx(value, rel=rel, abs=1e-4), name


@pytest.mark.parametrize("name", golden.CLASSIFIERS)
def test_methods(name):
    if name in DRAWN and str(torch.__version__) != KNOWN["torch"]:
        pytest.skip(f"the numbers are from torch {KNOWN['torch']}")
    known = KNOWN["classifiers"][name]
    near(golden.classifier_terms(name, known["arguments"]), known["numbers"], 1e-3)


@pytest.mark.parametrize("name", golden.DENSE)
def test_dense_methods(name):
    known = KNOWN["dense"][name]
    near(golden.dense_terms(name, known["arguments"]), known["numbers"], 1e-3)


@pytest.mark.parametrize("name", golden.NETWORKS)
def test_networks(name):
    found, known = torch.tensor(golden.logits(name)), torch.tensor(KNOWN["networks"][name])
    assert len(set(KNOWN["networks"][name])) == 20 and known.isfinite().all()
    torch.testing.assert_close(found, known, rtol=1e-3, atol=1e-3 * known.abs().max().item())


def test_a_short_training_run():
    "Rounding grows from step to step, so the terms of an epoch are compared, not what depends on a few images."
    for found, known in zip(golden.training(), KNOWN["training"], strict=True):
        terms = [name for name in known if name not in ("epoch", "lr") and "top" not in name]
        assert {"loss", "ce", "kd", "fcka"} <= set(terms) and (found["epoch"], found["lr"]) == (
            known["epoch"],
            known["lr"],
        )
        near({name: found[name] for name in terms}, {name: known[name] for name in terms}, 2e-2)
