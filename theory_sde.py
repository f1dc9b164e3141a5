"""Theorems 1 to 3, checked: how noisy a WGAN's generator is, and what a Lipschitz D must accept.

The claims (Sections 3.3 and 4.3, Appendices A to D): batches of m leave the generator a variance of
Theta(1/m), with constant steps (eq. 8) and with steps 1/t (eq. 10), and an L-Lipschitz D accepts
averages of close real images (eq. 11). Laws and simulations must agree: all |z| below 4.5 and no
bound violated, exit code 1 otherwise, in two minutes on one CPU core:

    python theory_sde.py

Each coordinate of the model is a copy of this game; a law gives m Var theta, and x is eta mu:

    w     <- w + eta (xi - theta)       eq. (5), D's ascent    xi ~ N(0, 2/m): mean of m reals
    theta <- theta + mu w               eq. (6), G's descent           minus mean of m latents

DEVIATION: the constraint ||w|| <= 1 is enforced only by `clip`. Without noise it holds by itself
(eq. 31); with noise it does not, and eq. (25) drops it too.
"""
import math
from argparse import Namespace

import numpy as np
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import core
import geometry
import harness
import sweep

# Runs of a check; the fixes' steps eta = mu and iterations; Adam steps of a critic.
PAPER = dict(jobs=1, paths=400_000, eta=0.05, horizon=10_000, critic_steps=400)
SMOKE = dict(jobs=1, paths=2_000, eta=0.2, horizon=400, critic_steps=20)
PRESETS = {"paper": PAPER, "cpu": PAPER, "smoke": SMOKE}
OWN = {"paths": (int, 1000, 10 ** 8, "simulated runs of a check, at least 1000")}
Z_MAX = 4.5     # of about 740 z; a correct program fails by chance in less than 1% of all seeds


def flow_law(t, eta=1.0, mu=1.0):
    """Theorem 1, eq. (8) solved: the flow (32). For unit steps 2 t^3 / 3 at first and t later."""
    speed = np.sqrt(eta * mu)
    return eta * mu * (t - np.sin(speed * t) * np.cos(speed * t) / speed)


def inverse_t_law(t):
    """Theorem 2, eq. (57) solved: steps 1/t, t >= 1. Cycles in ln t for ever, 1 +- 1/sqrt(5)."""
    return 1 - 0.8 / t - (np.cos(2 * np.log(t)) + 2 * np.sin(2 * np.log(t))) / 5


def clock(angle, power):
    """When (t >= 1) a flow with both steps t^-power, 0 <= power <= 1, has turned by angle >= 0."""
    return np.exp(angle) if power == 1 else (1 + (1 - power) * angle) ** (1 / (1 - power))


def power_law(angle, power):
    """That flow: 2 int_1^t s^(-2 power) sin^2(angle(t) - angle(s)) ds, to 1e-9 up to angle 100."""
    nodes, weights = np.polynomial.legendre.leggauss(400)   # in the angle: ds = s^power d angle
    half = np.asarray(angle, float)[..., None] / 2
    density = clock(half * (1 + nodes), power) ** -power * np.sin(half * (1 - nodes)) ** 2
    return (2 * half * density * weights).sum(-1)


def alternating_law(k, eta, mu):
    """Eqs. (5) and (6) as they stand, x < 4; each iteration turns by p. Grows like k for ever."""
    x, p = eta * mu, 2 * np.arcsin(np.sqrt(eta * mu) / 2)
    return x / (1 - x / 4) * (k - np.sin(k * p) * np.cos((k + 1) * p) / np.sin(p))


def simultaneous_law(k, eta, mu):
    """The same with G moving on the old w: plain Euler-Maruyama. Grows like (1 + x)^k."""
    x, turn = eta * mu, (1 + 1j * np.sqrt(eta * mu)) ** 2
    return (1 + x) ** k - 1 - x * ((turn ** k - 1) / (turn - 1)).real


# Methods, one iteration each: variables are rows of the unit matrix, so that the update yields the
# matrix (S, S + xi's) from the state (w, ..., theta) and the batch-mean differences xi to the next
# state. Its last entry is reported. One that changes with k is a function from k to such a matrix.


def sgd(eta, mu, gamma=0.0, n_dis=1, alternating=True):
    """Eqs. (5) and (6), with R1, gamma w^2 / 2, and n_dis updates of D per update of G."""
    w, theta, *xi = np.eye(2 + n_dis)
    w_new = w
    for noise in xi:
        w_new = w_new + eta * (noise - theta - gamma * w_new)
    return np.stack([w_new, theta + mu * (w_new if alternating else w)])


def optimistic(eta, mu):
    """Both move on twice the new gradient less the last one (Daskalakis et al. 2018)."""
    w, last_w, last_theta, theta, xi = np.eye(5)
    grad = xi - theta
    return np.stack([w + eta * (2 * grad - last_w), grad, w, theta + mu * (2 * w - last_theta)])


def averaged(matrix, weight):
    """A method with theta averaged: weight 1 - beta exponentially, 1/k over all k (Polyak)."""
    inner = np.insert(matrix, len(matrix), 0, axis=1)
    mean = np.eye(inner.shape[1])[len(matrix)]
    return np.vstack([inner, mean + weight * (inner[-1] - mean)])


def flow(h, power=0.0):
    """The flow (32), or (47) with both steps t^-power, from t = 1 in steps of h radians: noise by
    Euler-Maruyama between two exact half-turns, with errors of order h^2."""
    half = np.array([[np.cos(h / 2), -np.sin(h / 2)], [np.sin(h / 2), np.cos(h / 2)]])

    def matrix(k):
        begin, end = (clock(a * h, power) ** (1 - 2 * power) for a in (k - 1, k))
        return np.hstack([half @ half, half[:, :1] * np.sqrt((end - begin) / (1 - 2 * power))])
    return matrix


def at(method, k):
    return method(k) if callable(method) else method


def recursion(method, ks, q=2.0):
    """Exact means (K, S), m x covariances (K, S, S) after each k of ks, from ones; q = m Var xi."""
    size, kept = len(at(method, 1)), {}
    mean, cov = np.ones(size), np.zeros((size, size))
    for k in range(1, max(ks) + 1):
        turn, gain = np.split(at(method, k), [size], 1)
        mean, cov = turn @ mean, turn @ cov @ turn.T + q * gain @ gain.T
        kept[k] = mean, cov
    return tuple(map(np.stack, zip(*(kept[k] for k in ks))))


def simulate(method, ks, paths, noise, clip=math.inf, device="cpu"):
    """What independent runs from a state of ones report after each k of `ks`: float32 (K, paths).
    noise(n) draws one iteration's xi for n paths, (xi's, n). |w| <= clip, for plain `sgd`."""
    state, kept = torch.ones(len(at(method, 1)), paths, device=device), {}
    for k in range(1, max(ks) + 1):
        matrix = torch.from_numpy(at(method, k)).float().to(device)
        state = matrix @ torch.cat([state, noise(paths)])
        if clip < math.inf:     # undo what is too much of w, and what theta was moved by it
            state -= matrix[:, :1] * (state[0] - state[0].clamp(-clip, clip))
        kept[k] = state[-1].clone() if k in ks else None
    return torch.stack([kept[k] for k in ks])


def finite(images, m, scheme, gen):
    """Batch means from N fixed `images` of mean 0, variance 1: draw(n) (1, n), m x their variance.
    scheme: `iid`, or `subset`, m different ones each time."""
    def draw(n):
        how = {"generator": gen, "device": gen.device}
        pick = (torch.randint(len(images), (n, m), **how) if scheme == "iid" else
                torch.rand(n, len(images), **how).topk(m).indices)
        return images[pick].mean(1)[None]
    return draw, 1 if scheme == "iid" else (len(images) - m) / (len(images) - 1)


def check(s, name, method, ks, law=(), *, eta=1, mu=None, m=64, q=2.0, noise=None, share=1, t=None,
          clip=math.inf):
    """Add rows: m Var theta of paths/share runs after each k of `ks`, at the time t, against the
    law, or else the recursion; bias is E theta. q and noise as in `recursion` and `simulate`."""
    paths, noises = max(s.cfg.paths // share, 1000), at(method, 1).shape[1] - len(at(method, 1))
    noise = noise or (lambda n: math.sqrt(q / m) * s.normal(noises, n))
    theta = simulate(method, ks, paths, noise, clip, s.gen.device).double().cpu().numpy()
    mean, square = theta.mean(1), m * (theta - theta.mean(1, keepdims=True)) ** 2
    var, error = square.sum(1) / (paths - 1), square.std(1) / math.sqrt(paths)
    columns = {"k": ks, "t": ks if t is None else t, "measured": var, "halfwidth": 1.96 * error,
               "bias_measured": mean}
    if clip == math.inf:
        bias, cov = recursion(method, ks, q)
        bias, exact = bias[:, -1], law if len(law) else cov[:, -1, -1]
        columns |= {"exact": exact, "z": (var - exact) / (error + 1e-9), "bias": bias,
                    "bias_z": (mean - bias) / (np.sqrt(var / m / paths) + 1e-6)}
        # + 1e-9, + 1e-6: float32's own errors, for FGD, whose variance is zero
    s.rows += [{"check": name, "section": s.section, "m": m, "eta": eta, "mu": mu or eta,
                "exact": None, "z": None, "batches": noises, **dict(zip(columns, row))}
               for row in zip(*columns.values())]


def section_1(s):
    """Theorem 1: the flow, the two discrete games, and the law of the batch size."""
    ks, k, e, h = np.arange(20, 401, 20), np.arange(1, 21), 0.2, 0.05
    check(s, "const_sde", flow(h), ks, flow_law(h * ks), t=h * ks)
    check(s, "const_sde, plain Euler-Maruyama", sgd(h, h, alternating=False), ks[:5],
          simultaneous_law(ks[:5], h, h) / h, q=2 / h, t=h * ks[:5])
    check(s, "alternating", sgd(1, 1), k, alternating_law(k, 1, 1))
    check(s, "alternating, unequal steps", sgd(0.4, 0.05), ks[:10],
          alternating_law(ks[:10], 0.4, 0.05), eta=0.4, mu=0.05)
    check(s, "simultaneous", sgd(1, 1, alternating=False), k[:8], simultaneous_law(k[:8], 1, 1))
    for m in (1, 4, 16, 64):    # whole batches; reals not even Gaussian: only their variance counts
        def batch(n, m=m):
            x_real = torch.empty(m, n, device=s.gen.device).exponential_(generator=s.gen) - 1
            return (x_real - s.normal(m, n)).mean(0, keepdim=True)
        check(s, "alternating, exponential data", sgd(e, e), [40], [alternating_law(40, e, e)],
              eta=e, m=m, noise=batch, share=m)
        check(s, "alternating, |w| <= 1", sgd(e, e), [min(s.cfg.horizon, 150 * m)], eta=e, m=m,
              share=100, clip=1)


def section_2(s):
    """Theorem 2: the flow with steps 1/t and t^-power, the discrete game from k0 = 1 and 10."""
    for name, power, h, ks in (("inverse_t_sde", 1, 0.025, np.arange(32, 257, 8)),
                               ("power_sde, t^-0.75", 0.75, 0.05, np.arange(16, 257, 6)),
                               ("power_sde, t^-0.6", 0.6, 0.05, np.arange(16, 257, 6))):
        t = clock(h * ks, power)
        law = inverse_t_law(t) if power == 1 else power_law(h * ks, power)
        check(s, name, flow(h, power), ks, law, t=t)
    for k0, ks in ((1, [1, 2, 3, 4, 6, 8, 11, 16, 23, 33, 50, 75, 110, 160, 240, 350]),
                   (10, [2, 5, 8, 12, 17, 23, 32, 45, 64, 90, 130, 190, 270, 390])):
        check(s, f"alternating, steps 1/k from k0 = {k0}",
              lambda k, k0=k0: sgd(1 / (k0 + k - 1), 1 / (k0 + k - 1)), ks, t=np.array(ks) + k0)


def section_3(s):
    """The fixes on one long run, and the batch size that each is worth. Averaging leaves a bias."""
    e, last = s.cfg.eta, s.cfg.horizon
    plain, r1, ks = sgd(e, e), sgd(e, e, 1), np.geomspace(last // 50, last, 5).astype(int)
    for name, method, *steps in (       # steps: where they are not (e, e)
            ("alternating, no fix", plain), ("alternating, |w| <= 1, no fix", plain),
            ("alternating, 4 eta, mu/4", sgd(4 * e, e / 4), 4 * e, e / 4),
            ("alternating, steps 1/k", lambda k: sgd(1 / k, 1 / k), 1, 1),
            ("n_critic 5", sgd(e, e, n_dis=5)), ("r1 0.1", sgd(e, e, 0.1)), ("r1 1", r1),
            ("r1 1, mu/10", sgd(e, e / 10, 1), e, e / 10), ("r1 1, n_critic 5", sgd(e, e, 1, 5)),
            ("r1 1.75, steps 1/k", lambda k: sgd(1 / k, 1 / k, 1.75), 1, 1),
            ("omd", optimistic(e, e)), ("ema 0.999", averaged(plain, 1e-3)),
            ("ema 0.999, r1 1", averaged(r1, 1e-3)), ("polyak", lambda k: averaged(plain, 1 / k)),
            ("polyak, r1 1", lambda k: averaged(r1, 1 / k))):
        eta, mu = steps or (e, e)
        check(s, name, method, ks, eta=eta, mu=mu, share=50, clip=1 if "|w|" in name else math.inf)
        row = s.rows[-1]
        row["m_eq"] = alternating_law(last, e, e) / (row["exact"] or row["measured"])
        row["m_eq_per_sample"] = row["m_eq"] / row["batches"]


def section_4(s):
    """The 64 images of Section 3.2 as 64 numbers a side; MGD has m = 16, FGD 64."""
    # UNSPECIFIED: how Section 3.2 samples reals and latents. Three ways are shown; FGD is free of
    # noise only if both are all 64.
    images, ks = s.normal(2, 64), np.arange(8, 81, 8)
    images = (images - images.mean(1, keepdim=True)) / images.std(1, correction=0, keepdim=True)
    for real, latent in (("iid", "iid"), ("subset", "iid"), ("subset", "subset")):
        for m, gamma in ((16, 0.0), (16, 0.5), (64, 0.0)):
            x, q_x = finite(images[0], m, real, s.gen)
            z, q_z = finite(images[1], m, latent, s.gen)
            check(s, f"finite, {real} reals, {latent} latents, r1 {gamma}", sgd(0.2, 0.2, gamma),
                  ks, eta=0.2, m=m, q=q_x + q_z, share=100, noise=lambda n, x=x, z=z: x(n) - z(n))


def mcshane(x, images, values, lipschitz):
    """The least an L-Lipschitz f with f(images[i]) = values[i] can be at x, and itself such an f:
    x, images[i] (N, ...), values[i] (N,) -> (N,). Eq. (11) is this between two images, so sharp."""
    return torch.stack([v - lipschitz * (x - i).flatten(1).norm(dim=1)
                        for i, v in zip(images, values)]).amax(0)


def lipschitz_bound(D):
    """An upper bound for an MLP with 1-Lipschitz activations: the product of its spectral norms,
    each from all eigenvalues: power iteration finds less than the norm, and so no bound."""
    weights = [layer.weight for layer in D if hasattr(layer, "weight")]
    return math.prod(torch.linalg.eigvalsh(w @ w.T)[-1].item() ** 0.5 for w in weights)


class MaxMin(nn.Module):
    """Sorts pairs of units: 1-Lipschitz, and keeps gradients' norms (Anil et al. 2019)."""
    def forward(self, x):
        return x.unflatten(1, (-1, 2)).sort(2).values.flatten(1)


def train_critic(x_real, x_neg, x_comb, comb_weight, steps, seed):
    """An MLP D (N, 256) -> (N,), in float64, trained by eq. (13) against fixed negatives."""
    # UNSPECIFIED: the D of Theorem 3. One with spectral norms of about one, under the logistic loss
    # of 10 D: D's own scores are too small to leave the linear part of the loss.
    torch.manual_seed(seed)
    D = nn.Sequential(spectral_norm(nn.Linear(256, 128)), MaxMin(), spectral_norm(
        nn.Linear(128, 128)), MaxMin(), spectral_norm(nn.Linear(128, 1)), nn.Flatten(0))
    opt, (on_real, on_fake, _) = torch.optim.Adam(D.parameters(), 5e-3), core.LOSSES["ns"]
    for _ in range(steps):
        opt.zero_grad()
        core.pcr_loss(on_real(10 * D(x_real)), on_fake(10 * D(x_neg)), on_fake(10 * D(x_comb)),
                      comb_weight).backward()
        opt.step()
    return D.eval().double().requires_grad_(False)


def section_5(s):
    """Theorem 3 on critics trained with and without PCR: the bound, its premise, and controls."""
    # DEVIATION: PCR's negatives are the averages of the very pairs tested, not of all pairs.
    n, seed, gen = 64, s.cfg.seed, core.generator(s.cfg.seed)
    small, one, three = (core.to_float(geometry.draw(n, squares, size, 4, seed=seed))
                         for squares, size in ((2, 15), (1, 16), (3, 16)))
    shared = [core.to_float(x) for x in geometry.draw_pairs(n, 16, 4, seed=seed)[:2]]
    shifted = [nn.functional.pad(small, side, value=-1.0) for side in ((0, 1, 0, 1), (1, 0, 0, 1))]
    pairs = torch.stack([*shared, *shifted]).view(2, 2, n, 256)     # kind, first or second, ...
    x_real, x_comb = pairs.flatten(0, 2), pairs.mean(1).flatten(0, 1)
    x_neg = torch.cat([torch.rand(n, 256, generator=gen) * 2 - 1, one.flatten(1), three.flatten(1)])
    lam = torch.linspace(0, 1, 33).double()[:, None]
    for arm, comb_weight in (("vanilla", 0), ("pcr", 0.5)):
        D = train_critic(x_real, x_neg, x_comb, comb_weight, s.cfg.critic_steps, seed)
        bound, margin = lipschitz_bound(D), D(x_real.double()).min()
        for kind, (x1, x2) in zip(("one square shared", "shifted by 1 px"), pairs.double()):
            f1, f2, delta = D(x1), D(x2), (x1 - x2).norm(dim=1)
            away = nn.functional.normalize(torch.randn(n, 256, generator=gen)) * delta[:, None] / 2
            moved = (x2 - x1).gather(1, torch.rand(n, 256, generator=gen).argsort(1)) / 2
            points = torch.stack([*(a * x1 + (1 - a) * x2 for a in lam), x1 + away, x1 + moved])
            f = D(points.flatten(0, 1)).view(-1, n)
            least = torch.stack([mcshane(p, (x1, x2), (f1, f2), bound) for p in points])
            true = {"premise": margin > bound * (torch.minimum(lam, 1 - lam) * delta)[1:32],
                    "segment": f[1:32] > 0, "average": f[16:17] > 0, "random": f[33:34] > 0,
                    "permuted": f[34:] > 0}
            shares = {key: value.double().mean(0) for key, value in true.items()}   # by pair
            s.rows.append({
                "check": f"theorem3 {arm}, {kind}", "section": 5, "k": s.cfg.critic_steps,
                "t": None, "m": n, "eta": None, "mu": None, "z": None, "exact": 0, "halfwidth": 0,
                "measured": (f < least - 1e-9).sum(), "margin": margin, "delta": delta.mean(),
                "lipschitz": bound, "lam": lam[:, 0], "f": f[:33, 0], "least": least[:33, 0],
                "shares": {k: [v.mean(), 1.96 * v.std() / n ** 0.5] for k, v in shares.items()}})


def failures(rows):
    """The checks that refute the theory or the code: |z| not below Z_MAX, or a bound violated."""
    return sorted({r["check"] for r in rows
                   if not (abs(r["z"] or 0) < Z_MAX and abs(r.get("bias_z", 0)) < Z_MAX)
                   or r["section"] == 5 and r["measured"]})


def claims(rows):
    """Theorems 1 and 2 by all variances known exactly, Theorem 3 by eq. (11) and its premise."""
    z = np.abs([r["z"] for r in rows if r["z"] is not None])
    critics = [r for r in rows if r["section"] == 5]
    broken = sum(r["measured"] for r in critics)
    met = [100 * r["shares"]["premise"][0] for r in critics]
    return [{"paper": "Theorems 1, 2", "what": "the variance of theta is Theta(1/m)",
             "theirs": "proved", "ours": f"laws and exact recursions, {len(z)} checks, largest |z| "
             f"{z.max():.1f}, mean z^2 {(z**2).mean():.2f}: t/m (Theorem 1), a cycle around 1/m "
             "(Theorem 2)", "verdict": "in part" if z.max() < Z_MAX else "no", "front": True},
            {"paper": "Theorem 3", "what": "an L-Lipschitz D accepts averages of close reals",
             "theirs": "proved", "ours": f"{broken} violations; its premise holds for "
             f"{min(met):.0f} to {max(met):.0f}% of the points",
             "verdict": "no" if broken else "holds where its premise does", "front": True}]


PANELS = [  # title, x, scales of both, y's limits, {check: its label}
    ("Theorem 1: steps 1", "t", "linear", "linear", (-0.5, 45),
     {"const_sde": "flow", "alternating": "eqs. (5), (6)", "simultaneous": "simultaneous"}),
    ("Theorem 2: vanishing steps", "t", "log", "log", (2e-4, 6),
     {"inverse_t_sde": "flow, 1/t", "power_sde, t^-0.75": "flow, $t^{-0.75}$",
      "power_sde, t^-0.6": "flow, $t^{-0.6}$", "alternating, steps 1/k from k0 = 1": "steps 1/k",
      "alternating, steps 1/k from k0 = 10": "steps 1/k from k = 10"}),
    ("The fixes", "t", "log", "log", (1e-4, 1e4),
     {"alternating, no fix": "none", "omd": "optimistic", "r1 1": "R1", "ema 0.999": "EMA 0.999",
      "polyak": "Polyak", "ema 0.999, r1 1": "R1 and EMA"}),
    ("The batch size", "m", "log", "log", (0.02, 3),
     {"alternating, exponential data": "k = 40", "alternating, |w| <= 1": "|w| ≤ 1, settled"}),
    ("64 images, batches of 16", "t", "linear", "linear", (0, 4),
     {"finite, iid reals, iid latents, r1 0.0": "iid",
      "finite, subset reals, subset latents, r1 0.0": "no repeats",
      "finite, subset reals, subset latents, r1 0.5": "no repeats, R1 0.5"})]


def plot(folder):
    """figure.png from result.json: lines are exact, points are measured, with 95% intervals."""
    result, fig = sweep.read_result(folder, "theory_sde"), harness.figure(8.4)
    *axes, last = fig.subplots(3, 2).flat
    axes[0].axhline(1, color="grey", lw=1, label="constant, as eq. (8) reads")
    axes[1].axhspan(1 - 5 ** -0.5, 1 + 5 ** -0.5, color="0.88", label="limits of 1/t")
    axes[3].axhline(0.25, color="grey", lw=1, label="1/4, for small steps")
    for ax, (title, x, xscale, yscale, ylim, names) in zip(axes, PANELS):
        ax.set(title=title, xlabel={"t": "iterations t", "m": "batch size m"}[x], xscale=xscale,
               ylabel={"t": "m Var θ", "m": "Var θ"}[x], yscale=yscale, ylim=ylim)
        for (name, label), style, marker in zip(names.items(), harness.STYLE.values(), "os^Dvx"):
            here = [r for r in result["rows"]
                    if r["check"] == name and (r["m"] == 16 or r["section"] != 4)]
            exact, y, error = ([(r[key] or math.nan) / (r["m"] if x == "m" else 1)
                                for r in here] for key in ("exact", "measured", "halfwidth"))
            ax.plot([r[x] for r in here], exact, lw=1, **style)
            ax.errorbar([r[x] for r in here], y, error, fmt=marker, color=style["color"],
                        mfc="white", mew=0.8, lw=0.8, label=label)
        ax.legend(ncols=1 + (len(names) == 6))
    for r in [r for r in result["rows"] if r["check"].endswith("one square shared")]:
        arm = "pcr" if "pcr" in r["check"] else "vanilla"
        for key, ls, label in (("f", "-", f"f, {arm}"), ("least", ":", f"eq. (11), {arm}")):
            last.plot(r["lam"], r[key], ls, color=harness.style(arm)["color"], label=label)
        last.legend(loc="lower center", ncols=2)
    last.set(title="Theorem 3: f(λ x₁ + (1 - λ) x₂) between two reals", xlabel="λ", ylim=(-8, 1.5))
    harness.save_figure(fig, folder)
    return result


def run(cfg, folder):
    """All checks of the sections asked for -> their rows."""
    now, gen = harness.versions(), core.generator(cfg.seed, harness.pick_device(cfg.device))
    harness.write_json(folder / "config.json", {"flags": cfg, **now, "git": [now["git"] or ""]})
    s = Namespace(cfg=cfg, rows=[], gen=gen, normal=lambda *shape: torch.randn(
        shape, generator=gen, device=gen.device))
    for number in cfg.section:
        s.section = number
        (section_1, section_2, section_3, section_4, section_5)[number - 1](s)
    return s.rows


def main(argv=None):
    p = sweep.parser(__doc__, PRESETS, OWN, training=None)
    p.add_argument("--section", type=int, nargs="+", choices=range(1, 6), default=range(1, 6),
                   help="1 constant steps, 2 vanishing, 3 fixes, 4 the 64 images, 5 Theorem 3")
    args = sweep.parse(p, __file__, argv)
    if args.plot:
        return plot(args.plot)
    args.seeds, args.section = args.seeds or [0], sorted(set(args.section))
    given = {k: v for k, v in vars(args).items() if k not in sweep.NOT_CONFIG and v is not None}
    cfg = Namespace(**PRESETS[args.preset] | given, seed=args.seeds[0], run="theory")
    if len(args.seeds) > 1 or not 0 <= cfg.seed < 2 ** 63 or not 1000 <= cfg.paths <= 10 ** 8:
        raise core.UserError(f"--seeds {args.seeds} --paths {cfg.paths}: must be one seed in "
                             "[0, 2^63), and from 1000 to 10^8 paths")
    if sweep.announce([cfg], args.dry_run):
        return {}
    folder, rows = sweep.train_all(args, args.preset, [cfg], run)
    sweep.write_result(args, folder, [cfg], rows, claims(rows) if len(cfg.section) == 5 else [])
    result = plot(folder)
    if wrong := failures(rows):
        raise SystemExit(f"theory_sde.py: not as the theory says: {'; '.join(wrong)}")
    return result


if __name__ == "__main__":
    harness.cli(main)
