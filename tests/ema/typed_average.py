"""What a type checker is to know of an `EMAWrapper`: tests/project/test_release.py gives this file to two of them."""

from typing import Any, NamedTuple, assert_type

from torch import Tensor, nn, ones

import momentum_distill as md


class Encoded(NamedTuple):
    features: Tensor
    rows: int


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(ones(3))

    def forward(self, x: Tensor, *, keep: bool = True) -> Encoded:
        return Encoded(x * self.scale if keep else x[:1], len(x))


average = md.EMAWrapper(Encoder(), decay=0.9)
assert_type(average, md.EMAWrapper[Encoder])
assert_type(average.module, Encoder)
assert_type(average(ones(2, 3), keep=False), Encoded)
assert_type(average(ones(2, 3)).features, Tensor)
assert_type(md.EMAWrapper(nn.Linear(3, 2))(ones(2, 3)), Tensor)
assert_type(average.train(), md.EMAWrapper[Encoder])


def of_any_model(ema: md.EMAWrapper, model: nn.Module) -> None:
    """Without a type of the model, as before."""
    assert_type(ema, md.EMAWrapper[nn.Module])
    assert_type(ema(ones(1, 3), keep=False), Any)
    assert_type(md.EMAWrapper(model).module, nn.Module)
    ema.update(model)
    with ema.swap(model):
        pass


def of_an_encoder(ema: md.EMAWrapper[Encoder]) -> Encoded:
    return ema(ones(1, 3))


of_any_model(average, Encoder())
of_an_encoder(average)
named: md.EMAWrapper[nn.Linear] = md.EMAWrapper[nn.Linear](nn.Linear(3, 2))  # at run time too
