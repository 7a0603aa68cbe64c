"""SLTrain: what the weight is, what is trained, where it is put, and that it leaves an ordinary model."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from training import MODEL, TRAIN

from palimpsest.models import build
from palimpsest.models.config import ConfigError
from palimpsest.train import optim, sltrain
from palimpsest.train.config import read_config
from palimpsest.train.optim_config import SLTrainConfig

SETTINGS = SLTrainConfig(rank=2, density=0.1, alpha=3.0)


def prepared(seed=0, **changes):
    torch.manual_seed(0)
    model = build({"model": MODEL | changes})
    sltrain.apply(model, optim.hidden_matrices(model), SETTINGS, seed)
    return model


def parts(path="blocks.0.mlp.down", **options):
    return prepared(**options).get_submodule(path)


def test_the_weight_is_low_rank_plus_sparse_and_so_are_its_gradients():
    """y = x Wᵀ with W written out by numpy; gradients of B, A and S by hand from dW = dyᵀ x."""
    module = parts().double()
    nn.init.normal_(module.B)
    x = torch.randn(5, module.in_features, dtype=torch.float64)
    dy = torch.randn(5, module.out_features, dtype=torch.float64)
    y = module(x)
    y.backward(dy)
    b, a, values = (p.detach().numpy() for p in (module.B, module.A, module.values))
    sparse = np.zeros(module.out_features * module.in_features)
    for place, value in zip(module.support.tolist(), values, strict=True):
        sparse[place] = value
    w = 3.0 / 2 * b @ a + sparse.reshape(module.out_features, module.in_features)
    np.testing.assert_allclose(y.detach().numpy(), x.numpy() @ w.T, rtol=1e-12)
    dw = dy.numpy().T @ x.numpy()
    np.testing.assert_allclose(module.B.grad.numpy(), 1.5 * dw @ a.T, rtol=1e-10)
    np.testing.assert_allclose(module.A.grad.numpy(), 1.5 * b.T @ dw, rtol=1e-10)
    np.testing.assert_allclose(module.values.grad.numpy(), dw.ravel()[module.support.numpy()], rtol=1e-10)


def test_it_begins_as_in_the_paper():
    module = parts()
    count, bound = round(0.1 * module.in_features * module.out_features), 1 / math.sqrt(module.in_features)
    assert module.values.shape == (count,) and len(set(module.support.tolist())) == count
    assert not module.B.any()
    for drawn in (module.A, module.values):
        assert bound * 0.8 < drawn.abs().max() <= bound and abs(drawn.mean()) < bound / 3


def test_what_is_drawn_follows_from_seed_and_name():
    assert torch.equal(parts().support, parts().support) and torch.equal(parts().A, parts().A)
    others = [parts(seed=1), parts("blocks.1.mlp.down")]
    assert not any(torch.equal(parts().support, other.support) for other in others)


def test_hidden_matrices_are_replaced_where_that_leaves_less_to_train():
    model = prepared()
    replaced = {name for name, module in model.named_modules() if isinstance(module, sltrain.SparseLowRank)}
    torch.manual_seed(0)
    plain = build({"model": MODEL})
    small = {n for n, p in optim.hidden_matrices(plain).items() if 2 * sum(p.shape) + round(p.numel() / 10) < p.numel()}
    assert {f"{name}.weight" for name in replaced} == small and len(small) == 10
    untouched = {name: p for name, p in plain.named_parameters() if name not in small}
    assert {name for name, _ in model.named_parameters() if name.split(".")[-1] not in ("B", "A", "values")} == set(
        untouched
    )
    decaying, _ = optim.decay_groups(model)
    assert {f"{name}.{part}" for name in replaced for part in ("B", "A", "values")} < set(decaying)


def test_a_rank_that_saves_nothing_is_named():
    model = build({"model": MODEL})
    with pytest.raises(ConfigError, match=r"train.sltrain.rank was 16 with density 0.1; they must be small enough"):
        sltrain.apply(model, optim.hidden_matrices(model), SLTrainConfig(rank=16, density=0.1), 0)


def test_the_merged_model_answers_alike():
    model = prepared()
    for module in model.modules():
        if isinstance(module, sltrain.SparseLowRank):
            nn.init.normal_(module.B)
    plain = build({"model": MODEL})
    plain.load_state_dict(sltrain.dense(model, dict(model.state_dict())))
    tokens = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, plain(tokens).logits)


@pytest.mark.parametrize("optimizer", ["adamw", "spam"])
def test_it_trains_and_keeps_state_of_its_own_numbers_alone(optimizer):
    model = prepared()
    settings = read_config({"name": "x", "model": MODEL, "train": TRAIN | {"optimizer": optimizer, "lr": 0.02}}).train
    made, tokens = optim.make(model, settings), torch.arange(32).view(2, 16) % 7
    losses = []
    for _ in range(12):
        loss = model(tokens[:, :-1], targets=tokens[:, 1:].contiguous()).loss
        made.zero_grad()
        loss.backward()
        made.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses
    assert optim.state_bytes(made) == 4 * sum(2 * p.numel() + 1 for p in model.parameters())


def test_under_autocast_the_weight_stays_exact():
    module = parts()
    nn.init.normal_(module.B)
    exact = module.weight
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module.weight, exact) and module(torch.ones(1, module.in_features)).dtype == torch.bfloat16
