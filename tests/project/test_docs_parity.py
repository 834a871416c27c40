"""docs/coming_from.md: what stands side by side gives the same numbers.

A section of the page makes `theirs` and `ours`. Its `python` blocks run anywhere; its `py` blocks need the other
library. Below, the same comparisons over sizes, with gradients.
"""

import importlib
import re
import sys

import pytest
import torch
from torch.nn import functional as F

from common import import_part
from conftest import ROOT
from momentum_distill.functional import supcon_distill_loss as contrast

PAGE = ROOT / "docs" / "coming_from.md"
FENCE = re.compile(r"^```(py|python)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
EXACT = {"rtol": 1e-12, "atol": 0}
TOLERANCES = {
    "pytorch_metric_learning": {"rtol": 1e-6, "atol": 0},  # adds 1e-7 to the number of positives
    "lightly": EXACT,
    "timm": EXACT,
    "ema_pytorch": {"rtol": 1e-6, "atol": 1e-7},  # has its decay in float32
}


def sections():
    """Title and blocks, `(language, code)`, of the page and of each section of it."""
    parts = re.split(r"^##+ (.+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    titles, texts = ["", *parts[1::2]], parts[0::2]
    return [(title, FENCE.findall(text)) for title, text in zip(titles, texts, strict=True)]


def compared():
    """The sections that make both numbers."""
    return [
        title
        for title, blocks in sections()
        if re.search(r"^theirs\b", "".join(code for _, code in blocks), flags=re.M)
    ]


def import_library(name):
    """Make `name` importable as the page imports it, also where torchvision is missing."""
    if name == "timm":
        module = import_part("timm.utils.model_ema", bare=("timm", "timm.utils"))
        sys.modules["timm.utils"].ModelEmaV3 = module.ModelEmaV3
    elif name == "lightly":
        packages = ("lightly.loss", "lightly.models", "lightly.models.modules", "lightly.utils")
        module = import_part("lightly.loss.ntx_ent_loss", bare=packages)
        sys.modules["lightly.loss"].NTXentLoss = module.NTXentLoss
        import_part("lightly.models.utils", bare=("lightly.models",))
    else:
        importlib.import_module(name)


def run_up_to(title):
    """The names after the section `title`, everything before it included but for other libraries' blocks."""
    torch.manual_seed(0)
    names = {}
    for heading, blocks in sections():
        for language, code in blocks:
            if language == "py" and heading != title:
                continue
            exec(compile(code, str(PAGE), "exec"), names)  # nosec B102 - a page of this repository
        if heading == title:
            return names
        names.pop("theirs", None)
        names.pop("ours", None)
    raise AssertionError(title)


def as_tensor(value):
    return torch.stack(list(value)) if isinstance(value, list) else value.detach()


def test_the_page_compares_with_all_that_it_names():
    assert compared() == [
        "pytorch-metric-learning",
        "A batch with itself",
        "CrossBatchMemory",
        "lightly",
        "SupContrast",
        "ALBEF, MoCo, BLIP",
        "open_clip: SigLipLoss",
        "torch.optim.swa_utils",
        "timm",
        "ema-pytorch",
        "lightly's update_momentum",
    ]


@pytest.mark.parametrize("title", compared())
def test_both_sides_of_a_section_give_the_same(title):
    code = "".join(
        code for heading, blocks in sections() for language, code in blocks if (heading, language) == (title, "py")
    )
    libraries = [name for name in TOLERANCES if re.search(rf"^from {name}\b", code, flags=re.MULTILINE)]
    for library in libraries:
        import_library(library)
    with torch.random.fork_rng():
        names = run_up_to(title)
    theirs, ours = as_tensor(names["theirs"]), as_tensor(names["ours"])
    assert theirs.dtype == torch.float64
    assert theirs.abs().max() > 0
    torch.testing.assert_close(ours.double(), theirs, **(TOLERANCES[libraries[0]] if libraries else EXACT))


# ------------------------------------------------------------------------------------- over sizes, with gradients


def unit_rows(rows, width, seed):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64), dim=1)


def assert_same_gradients(theirs, ours, *leaves, **tolerance):
    """Of two functions of the same leaves: their values, and the gradients for each of them."""
    found = []
    for loss_fn in (theirs, ours):
        loss = loss_fn(*(given := [leaf.clone().requires_grad_() for leaf in leaves]))
        found.append((loss.detach(), *torch.autograd.grad(loss, given)))
    for expected, actual in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, **({"rtol": 1e-10, "atol": 1e-12} | tolerance))


@pytest.mark.parametrize("seed", range(5))
def test_albef_has_our_gradient(seed):
    """Its loss is ours plus alpha times the entropy of the targets, which has no gradient."""
    rows, slots, width, temperature, alpha = 3 + seed, 20 + 7 * seed, 4 + seed, 0.07 + 0.1 * seed, 0.2 * seed
    query, momentum, keys = (unit_rows(n, width, 10 * seed + i) for i, n in enumerate((rows, rows, slots)))
    ids, key_ids = torch.arange(rows), torch.arange(slots) % rows

    def theirs(query, tau):
        soft = (momentum @ keys.T / temperature).softmax(dim=1)
        same = (ids[:, None] == key_ids).double()
        targets = alpha * soft + (1 - alpha) * same / same.sum(dim=1, keepdim=True)
        loss = -(targets * (query @ keys.T / tau).log_softmax(dim=1)).sum(dim=1).mean()
        return loss + alpha * (soft * soft.log()).sum(dim=1).mean()

    def ours(query, tau):
        options = {"momentum_query": momentum, "momentum_keys": keys, "alpha": alpha, "normalize": False}
        return contrast(query, keys, ids, key_ids, temperature=tau, **options)

    assert_same_gradients(theirs, ours, query, torch.tensor(temperature, dtype=torch.float64))


@pytest.mark.parametrize("seed", range(5))
def test_moco_has_our_gradient(seed):
    """One positive key each, and a queue of negatives: the cross-entropy of class 0."""
    width, slots, temperature = 4 + seed, 5 + 9 * seed, 0.07 + 0.1 * seed
    sizes = ((1, seed), (1, 50 + seed), (slots, 99 - seed))
    query, positive, bank = (unit_rows(rows, width, drawn) for rows, drawn in sizes)
    one, nobody = torch.tensor([7]), torch.full((slots,), -2)

    def theirs(query):
        logits = torch.cat([query @ positive.T, query @ bank.T], dim=1) / temperature
        return F.cross_entropy(logits, torch.tensor([0]))

    def ours(query):
        options = {"temperature": temperature, "normalize": False}
        return contrast(query, (positive, bank), one, (one, nobody), **options)

    assert_same_gradients(theirs, ours, query)


@pytest.mark.parametrize("seed", range(3))
def test_pytorch_metric_learning_has_our_gradient(seed):
    from pytorch_metric_learning import losses

    rows, slots, width = 5 + seed, 30 + seed, 6
    keys, labels, key_labels = unit_rows(slots, width, seed + 20), torch.arange(rows) % 3, torch.arange(slots) % 3
    theirs = losses.SupConLoss(temperature=0.2)
    for given, ours in (
        ({"ref_emb": keys, "ref_labels": key_labels}, lambda x: contrast(x, keys, labels, key_labels, temperature=0.2)),
        ({}, lambda x: contrast(x, x, labels, labels, temperature=0.2, exclude_self=True)),
    ):
        query = 3 * unit_rows(rows, width, seed)  # theirs adds a small number to the count of positives
        assert_same_gradients(lambda x, given=given: theirs(x, labels, **given), ours, query, rtol=1e-6, atol=1e-8)
