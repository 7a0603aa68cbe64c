"""Each method against its paper's update, written out in float64; then on a model: routes, bytes, resuming, groups."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from training import MODEL, TRAIN

from palimpsest.models import build
from palimpsest.models.config import ConfigError
from palimpsest.train import optim
from palimpsest.train.checkpoint import Checkpointer
from palimpsest.train.config import read_config
from palimpsest.train.optimizers import subspace
from palimpsest.train.optimizers.fira import Fira
from palimpsest.train.optimizers.frugal import Frugal
from palimpsest.train.optimizers.galore import GaLore
from palimpsest.train.optimizers.spam import Spam

LR, BETAS, EPS, DECAY = 0.02, (0.9, 0.95), 1e-8, 0.1
COMMON = {"lr": LR, "betas": BETAS, "eps": EPS}
SHAPES = {"wide": (5, 9), "tall": (8, 4), "square": (6, 6)}
EXACT = {"rtol": 1e-9, "atol": 1e-12}  # both are float64: what is left is the order of sums


def follow(make, shape, gradients):
    """The weights after each update of one matrix by an optimizer, from ones."""
    weight = nn.Parameter(torch.ones(shape, dtype=torch.float64))
    optimizer, seen = make(weight), []
    for gradient in gradients:
        weight.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
        seen.append(weight.detach().numpy().copy())
    return seen


def draws(shape, count, seed=0):
    return list(np.random.default_rng(seed).normal(size=(count, *shape)))


class Adam:
    """m̂/(√v̂ + ε), with moments of whatever shape comes first."""

    def __init__(self):
        self.m = self.v = 0.0
        self.t = 0

    def __call__(self, g):
        self.t += 1
        self.m = BETAS[0] * self.m + (1 - BETAS[0]) * g
        self.v = BETAS[1] * self.v + (1 - BETAS[1]) * g**2
        return self.m / (1 - BETAS[0] ** self.t) / (np.sqrt(self.v / (1 - BETAS[1] ** self.t)) + EPS)


def first_vectors(g, rank):
    """The first singular vectors of the shorter side, each with its largest entry positive."""
    u, _, vt = np.linalg.svd(g)
    vectors = (u.T if g.shape[0] <= g.shape[1] else vt)[:rank]
    return np.stack([v if v[np.abs(v).argmax()] > 0 else -v for v in vectors], axis=1)


def low_rank(shape, gradients, rank, every, scale, growth=None):
    """GaLore, and with ``growth`` Fira, in the paper's notation for m ≤ n; of a tall matrix, the transpose."""
    turn = shape[0] > shape[1]
    w, adam, before, seen = np.ones(shape), Adam(), None, []
    for t, g in enumerate(gradients):
        whole = g
        if turn:
            g = g.T
        if t % every == 0:
            p = first_vectors(whole, rank)
        r = p.T @ g
        n = adam(r)
        update = scale * p @ n
        if growth is not None:
            s = (g - p @ r) * (np.linalg.norm(n, axis=0) / np.linalg.norm(r, axis=0))
            if before is not None and np.linalg.norm(s) > growth * before:
                s *= growth * before / np.linalg.norm(s)
            before = np.linalg.norm(s)
            update = update + s
        w = w - LR * DECAY * w - LR * (update.T if turn else update)
        seen.append(w)
    return seen


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_galore_is_the_papers(shape):
    gradients, told = draws(shape, 8), {"rank": 2, "refresh_every": 3, "scale": 0.25}
    seen = follow(lambda w: GaLore([{"params": [w], "weight_decay": DECAY}], **COMMON, **told), shape, gradients)
    np.testing.assert_allclose(seen, low_rank(shape, gradients, 2, 3, 0.25), **EXACT)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_fira_is_the_papers(shape):
    """Gradients grow threefold at the fifth update, where the limiter must hold the rest back, and later fall again.

    φ's denominator has 1e-8 added, of norms of about 1: the tolerance is that.
    """
    gradients = draws(shape, 8)
    gradients = [g * (3.0 if 4 <= i < 6 else 1.0) for i, g in enumerate(gradients)]
    told = {"rank": 2, "refresh_every": 3, "scale": 0.25, "growth": 1.01}
    seen = follow(lambda w: Fira([{"params": [w], "weight_decay": DECAY}], **COMMON, **told), shape, gradients)
    expected = low_rank(shape, gradients, 2, 3, 0.25, growth=1.01)
    np.testing.assert_allclose(seen, expected, rtol=1e-6, atol=1e-9)
    assert np.abs(np.subtract(expected, low_rank(shape, gradients, 2, 3, 0.25, growth=1e9))).max() > 1e-3


@pytest.mark.parametrize("space", ["columns", "random", "svd"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_frugal_is_the_papers(shape, space):
    """Adam, begun anew every third update, on the projected gradient; signs of the rest."""
    gradients, told = draws(shape, 8), {"density": 0.4, "refresh_every": 3, "free_lr_scale": 0.5, "space": space}

    def make(weight):
        groups = [{"params": [weight], "weight_decay": DECAY}]
        return Frugal(groups, **COMMON, **told, seed=7, names={weight: "a.weight"})

    w, turn, expected = np.ones(shape), shape[0] > shape[1], []
    short, like = round(0.4 * min(shape)), torch.empty(shape, dtype=torch.float64)
    for t, g in enumerate(gradients):
        if t % 3 == 0:
            adam, key = Adam(), subspace.key_of(7, t // 3, "a.weight")
            if space == "columns":  # P: rows are projected away from a unit matrix of the columns' side
                p = np.eye(shape[1])[:, subspace.columns(like, round(0.4 * shape[1]), key).numpy()]
            else:
                p = first_vectors(g, short) if space == "svd" else subspace.random(like, short, key).numpy()
        left = space != "columns" and not turn
        r = p.T @ g if left else g @ p
        back = (lambda x: p @ x) if left else (lambda x: x @ p.T)  # noqa: B023
        rest = g - back(r)
        sign = np.where(np.abs(rest) > 1e-12, np.sign(rest), 0.0)  # zero where a column was projected as it is
        w = w - LR * DECAY * w - LR * (back(adam(r)) + 0.5 * sign)
        expected.append(w)
    np.testing.assert_allclose(follow(make, shape, gradients), expected, **EXACT)


def test_what_frugal_draws_changes_with_name_and_number_and_is_orthonormal():
    like = torch.empty(30, 40, dtype=torch.float64)
    keys = [subspace.key_of(*what) for what in ((0, 0, "a"), (0, 1, "a"), (0, 0, "b"), (1, 0, "a"))]
    drawn = [subspace.columns(like, 10, key).tolist() for key in keys]
    assert len({tuple(columns) for columns in drawn}) == 4 and all(len(set(columns)) == 10 for columns in drawn)
    assert drawn[0] == subspace.columns(like, 10, keys[0]).tolist()
    basis = subspace.random(like, 5, keys[0])
    assert basis.shape == (30, 5)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(5, dtype=torch.float64))


def test_spam_is_the_papers():
    """Element by element: spikes at updates 4 and 9, resets at 5 and 10 with two updates of warm-up."""
    gradients = draws((3, 4), 12)
    gradients[3][1, 2], gradients[8][0, 0] = 40.0, -30.0
    theta, every, warm, after = 4.0, 5, 2, 2
    told = {"threshold": theta, "reset_every": every, "warmup_steps": warm, "clip_after": after}
    seen = follow(lambda w: Spam([{"params": [w], "weight_decay": DECAY}], **COMMON, **told), (3, 4), gradients)
    clipped = 0
    for i in range(3):
        for j in range(4):
            w, m, v, known, since = 1.0, 0.0, 0.0, 0, None
            for t, gradient in enumerate(gradients, 1):
                g = float(gradient[i, j])
                if t % every == 0:
                    m, v, known, since = 0.0, 0.0, 0, 0
                if known >= after and g * g / v > theta:
                    g = math.copysign(math.sqrt(theta * v), g)
                    clipped += 1
                m = BETAS[0] * m + (1 - BETAS[0]) * g
                v = BETAS[1] * v + (1 - BETAS[1]) * g * g
                known += 1
                scale = 1.0
                if since is not None:
                    since += 1
                    scale = (1 - math.cos(math.pi * since / warm)) / 2 if since < warm else 1.0
                step = m / (1 - BETAS[0] ** t) / (math.sqrt(v / (1 - BETAS[1] ** t)) + EPS)
                w = w - LR * DECAY * w - LR * scale * step
                assert seen[t - 1][i, j] == pytest.approx(w, rel=1e-9), (t, i, j)
    assert clipped >= 2


def test_spam_without_spikes_and_resets_is_adamw():
    gradients, told = draws((3, 4), 6), {"threshold": 1e9, "reset_every": 100, "warmup_steps": 10, "clip_after": 1}
    mine = follow(lambda w: Spam([{"params": [w], "weight_decay": DECAY}], **COMMON, **told), (3, 4), gradients)
    theirs = follow(lambda w: torch.optim.AdamW([w], **COMMON, weight_decay=DECAY), (3, 4), gradients)
    np.testing.assert_allclose(mine, theirs, **EXACT)


# -- on a model -------------------------------------------------------------------------------------------------------

LOW = {"rank": 4, "refresh_every": 4}
ARMS = {
    "adamw": {},
    "muon": {},
    "galore": {"galore": LOW},
    "fira": {"fira": LOW},
    "frugal": {"frugal": {"refresh_every": 4}},
    "frugal-random": {"frugal": {"refresh_every": 4, "subspace": "random"}},
    "frugal-svd": {"frugal": {"refresh_every": 4, "subspace": "svd"}},
    "spam": {"spam": {"reset_every": 5, "warmup_steps": 2, "clip_after": 1, "threshold": 20}},
}
TOKENS = torch.randint(0, 8, (4, 17), generator=torch.Generator().manual_seed(0))


def settings(name, **changes):
    train = TRAIN | {"optimizer": name.split("-")[0], "lr": 0.02} | ARMS[name] | changes
    return read_config({"name": "x", "model": MODEL, "train": train}).train


def model(seed=0):
    torch.manual_seed(seed)
    return build({"model": MODEL})


def update(model, optimizer, rate=0.02):
    optim.set_learning_rate(optimizer, rate)
    loss = model(TOKENS[:, :-1], targets=TOKENS[:, 1:].contiguous()).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("name", ARMS)
def test_it_trains_and_goes_on_from_a_checkpoint_bit_for_bit(tmp_path, name):
    one = model()
    optimizer = optim.make(one, settings(name), 5)
    losses = [update(one, optimizer) for _ in range(7)]
    rates = [0.03, 0.02, 0.01, 0.02, 0.01, 0.01]  # which must reach the groups that loading a state makes anew
    path = Checkpointer(tmp_path).save(7, one, optimizer)
    other = model(seed=1)
    fresh = optim.make(other, settings(name), 5)
    Checkpointer(tmp_path).restore(path, other, fresh)
    losses += [update(one, optimizer, rate) for rate in rates]
    assert losses[-6:] == [update(other, fresh, rate) for rate in rates]
    for (key, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), key
        for part, value in optimizer.state[a].items():
            assert torch.equal(value, fresh.state[b][part]), (key, part)
    assert losses[-1] < 0.7 * losses[0], losses


def hidden_and_rest():
    """The tiny model's parameters: matrices from features to features by name, and how many numbers the others have."""
    hidden = {name: tuple(p.shape) for name, p in model().named_parameters() if name in HIDDEN}
    rest = [p.numel() for name, p in model().named_parameters() if name not in HIDDEN]
    return hidden, rest


HIDDEN = {
    "blocks.0.mixer.core.qkv.weight",
    "blocks.0.mixer.out.weight",
    "blocks.0.mlp.gate_up.weight",
    "blocks.0.mlp.down.weight",
    "blocks.1.mixer.attention.qkv.weight",
    "blocks.1.mixer.memory.proj.weight",
    "blocks.1.mixer.memory.out.weight",
    "blocks.1.mixer.gate.out.weight",
    "blocks.1.mlp.gate_up.weight",
    "blocks.1.mlp.down.weight",
}


def test_hidden_matrices_name_by_name():
    """Neither embeddings, head, norms, gates, routers, convolutions nor W_0."""
    assert set(optim.hidden_matrices(model())) == HIDDEN
    assert set(optim.hidden_matrices(build({"model": MODEL | {"tie_embeddings": False}}))) == HIDDEN
    memory = {"kind": "mixture", "heads": 2, "memories": 4, "top_k": 2}
    mixture = optim.hidden_matrices(build({"model": MODEL | {"mixer": memory}}))
    assert not any("router" in name or "gates" in name for name in mixture) and len(mixture) == 8, set(mixture)


STATE = {  # numbers kept of a hidden matrix [m, n]
    "adamw": lambda m, n: 2 * m * n + 1,
    "muon": lambda m, n: m * n,
    "galore": lambda m, n: 2 * 4 * max(m, n) + 4 * min(m, n) + 1,
    "fira": lambda m, n: 2 * 4 * max(m, n) + 4 * min(m, n) + 2,
    "frugal": lambda m, n: 2 * m * round(n / 4) + 1,
    "frugal-random": lambda m, n: round(min(m, n) / 4) * (2 * max(m, n) + min(m, n)) + 1,
    "frugal-svd": lambda m, n: round(min(m, n) / 4) * (2 * max(m, n) + min(m, n)) + 1,
    "spam": lambda m, n: 2 * m * n + 1,
}


@pytest.mark.parametrize("name", ARMS)
def test_the_state_is_as_large_as_the_formula_says(name):
    whole = model()
    optimizer = optim.make(whole, settings(name))
    update(whole, optimizer)
    hidden, rest = hidden_and_rest()
    numbers = sum(STATE[name](*shape) for shape in hidden.values()) + sum(2 * size + 1 for size in rest)
    assert optim.state_bytes(optimizer) == 4 * numbers


@pytest.mark.parametrize("name", [name for name in ARMS if name != "spam"])
def test_what_a_method_does_not_take_is_adamws(name):
    one, other = model(), model()
    mine = optim.make(one, settings(name))
    theirs = optim.adamw(other, lr=0.02, betas=BETAS, eps=EPS, weight_decay=0.1)
    update(one, mine)
    update(other, theirs)
    for (key, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b) == (key not in HIDDEN or name == "adamw"), key


def newton_schulz(g, steps=5):
    """Muon's orthogonalisation (Jordan et al., 2024), for a matrix with no more rows than columns."""
    x = g / np.linalg.norm(g)
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def test_muon_updates_hidden_matrices_as_published():
    """Two updates with Nesterov momentum by gradients whose singular values are alike: torch orthogonalises in
    bfloat16, which then is right to 3 % of the update's RMS."""
    whole, name = model(), "blocks.1.mlp.down.weight"
    optimizer = optim.make(whole, settings("muon"))
    weight = dict(whole.named_parameters())[name]
    w, momentum = weight.detach().double().numpy().copy(), 0.0
    for g in draws(tuple(weight.shape), 2):
        for parameter in whole.parameters():
            parameter.grad = torch.zeros_like(parameter)
        weight.grad = torch.from_numpy(g).float()
        optimizer.step()
        momentum = 0.95 * momentum + g
        moved = 0.1 * w + 0.2 * math.sqrt(max(w.shape)) * newton_schulz(g + 0.95 * momentum)
        after = weight.detach().double().numpy().copy()
        error = np.sqrt(np.mean((after - (w - 0.02 * moved)) ** 2) / np.mean((0.02 * moved) ** 2))
        assert error < 0.03
        w = after


def test_muons_options_reach_it():
    told = {"momentum": 0.5, "nesterov": False, "ns_steps": 3, "adjust_lr": "original"}
    group = optim.make(model(), settings("muon", muon=told)).param_groups[0]
    assert [group[key] for key in ("momentum", "nesterov", "ns_steps", "adjust_lr_fn")] == list(told.values())


@pytest.mark.parametrize("name", ["galore", "fira"])
def test_a_rank_that_leaves_no_matrix_is_named(name):
    with pytest.raises(ConfigError, match=f"train.{name}.rank was 16; it must be less than .* at most 15"):
        optim.make(model(), settings(name, **{name: {"rank": 16}}))


# -- groups -----------------------------------------------------------------------------------------------------------

RULES = [{"match": "blocks.0.mlp.*", "lr_scale": 0.5, "weight_decay": 0.0}, {"match": "*.mlp.*", "lr_scale": 0.25}]


@pytest.mark.parametrize("name", ARMS)
def test_the_first_rule_that_matches_holds_with_every_optimizer(name):
    whole = model()
    optimizer = optim.make(whole, settings(name, groups=RULES))
    optim.set_learning_rate(optimizer, 0.08)
    found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    decaying, _ = optim.decay_groups(whole)
    for key, parameter in whole.named_parameters():
        group, plain = found[id(parameter)], 0.1 if key in decaying else 0.0
        expected = (0.08, plain)
        if ".mlp." in key:
            expected = (0.04, 0.0) if key.startswith("blocks.0") else (0.02, plain)
        assert (group["lr"], group["weight_decay"]) == expected, key


@pytest.mark.parametrize("name", ARMS)
def test_a_rule_scales_what_is_learnt(name):
    moved = []
    for scale in (1.0, 0.5):
        whole = model()
        before = [p.detach().clone() for p in whole.parameters()]
        rules = [{"match": "*", "lr_scale": scale, "weight_decay": 0.0}]
        update(whole, optim.make(whole, settings(name, groups=rules)))
        moved.append([p.detach() - b for p, b in zip(whole.parameters(), before, strict=True)])
    for whole_way, half in zip(*moved, strict=True):  # float32 weights of about 1: their last bits
        torch.testing.assert_close(half, whole_way / 2, rtol=1e-3, atol=2e-7)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            [{"match": "*.gate_s.*"}],
            r"train.groups.0.match was '\*.gate_s.\*', which matches nothing; it must match a par",
        ),
        (
            [*RULES, {"match": "blocks.1.mlp.down*"}],
            r"train.groups.2.match was .* a name that rule \[1\] before it leaves",
        ),
    ],
)
def test_a_rule_that_matches_nothing_is_named(rules, message):
    with pytest.raises(ConfigError, match=message):
        optim.make(model(), settings("adamw", groups=rules))
