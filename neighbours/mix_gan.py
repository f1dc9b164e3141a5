"""MIX+GAN (Arora, Ge, Liang, Ma, Zhang 2017): do several generators beat one of their size?

A GAN may play well and have learned little: a D hardly tells two samples of a law apart. Mixtures
come close to an equilibrium: T pairs, weighed by w and v; published for T times the networks.

    python -m neighbours.mix_gan --dataset grid --seeds 0 1 2
    python -m neighbours.mix_gan --part distance --seeds 0 1 2

Arms: vanilla; mix, T of each, all against all; wide, one pair with as many weights as mix; pooled,
T GANs side by side, each with batches of its own; many-g and many-d, T of one kind; frozen, w and v
uniform. Data: ring, grid and circle of points, images of two rectangles (geometry), CIFAR-10.
Presets: paper (one GPU), cpu (vanilla, mix, wide: ten minutes a seed on a core), smoke (seconds).
"""
import bisect
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

import core
import data
import geometry
import harness
import neighbours
import sweep

# UNSPECIFIED: the step size of w and v. At the networks' 1e-4 of the authors' code they hardly
# move. UNSPECIFIED: the unit of the entropy term, whose weight is 0.1 there, beside logarithmic
# losses. Here it is the spread of the payoffs, a critic's having no unit; theirs would be 1 to 2.
# DEVIATION: T is 3. The authors' code has 5, whose mixture costs 25 calls of D an update, not 9.
COMMON = neighbours.COMMON | dict(components=3, mix_entropy=1.0, lr_w=1e-2)
W1, GAPS = "W1 of two samples", ("gap of a trained D", "on fresh points", "from sample to law")
DISTANCE = {    # d and m of W1; in 64 dimensions a D's hidden units and updates, and m, of its gap
    "cpu": dict(w1_d=[64, 1024], w1_m=[100, 300, 1000, 3000], hidden=[2, 16, 128], updates=300,
                gap_m=[64, 256, 1024, 4096, 16_384]),
    "smoke": dict(w1_d=[64], w1_m=[10, 100], hidden=[2, 4], updates=10, gap_m=[300, 600])}
OWN = {
    "part": (("gan", "distance"), "(%(default)s)"),
    "components": (int, 1, 100, "T, nets of a kind"),
    "mix_entropy": (float, 0, 10 ** 6, "weight of the cross-entropy of w and v to uniform"),
    "lr_w": (float, 0, 10 ** 6, "Adam step size of the logits of w and v"), **neighbours.OWN}


class Mixture(nn.Module):
    """T networks and their weights, softmax of `logits` (T,). A G of them deals z (B, 1 + Z) out in
    training, B / T rows a component, in order; in evaluation z's first entry picks a component."""

    def __init__(self, nets, learn):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(len(nets)), requires_grad=learn)
        self.nets = nn.ModuleList(nets)

    def weights(self):
        return self.logits.softmax(0)

    def pick(self, z):
        """Components (B,) for z (B, 1 + Z): the quantiles of the weights at Phi(z_0)."""
        ends = self.weights().cumsum(0)[:-1]
        return torch.searchsorted(ends, torch.special.ndtr(z[:, 0].contiguous()))

    def forward(self, z):
        if self.training:
            parts = z[:, 1:].tensor_split(len(self.nets))
            return torch.cat([net(part) for net, part in zip(self.nets, parts)])
        x = torch.stack([net(z[:, 1:]) for net in self.nets])
        return x[self.pick(z), torch.arange(len(z), device=z.device)]


def weighed(losses, mixture, entropy):
    """sum_k q_k l_k + lam R(q) of losses l (T,) and weights q, and the entropy of q, in nats. R is
    the cross-entropy of q to uniform, lam `entropy` times the spread of the losses."""
    q, spread = mixture.weights(), (losses.max() - losses.min()).detach()
    paid = (q * losses).sum() - entropy * spread * (q + 1e-6).log().mean()
    return paid, torch.special.entr(q).sum()


def each_d(t, batches):
    """core.d_loss of each D alone, on a batch of its own -> losses (T,), {name: their mean}."""
    losses, logs = zip(*(core.d_loss(Namespace(cfg=t.cfg, gen=t.gen, device=t.device, D=D), *batch)
                         for D, batch in zip(t.D.nets, batches)))
    return torch.stack(losses), {k: sum(log[k] for log in logs) / len(logs) for k in logs[0]}


def mix(t, x_real, x_fake):
    """sum_j v_j (D_j's loss on reals, and on fakes weighed by w), and the entropy term of v."""
    # UNSPECIFIED: images a component. B / T, so that a D sees as many fakes as reals, and its
    # penalty holds between reals and equally many fakes of each component.
    w = t.G.weights().detach()
    weight = torch.cat([q.expand(len(part)) * len(x_fake) / len(part)
                        for q, part in zip(w, x_fake.tensor_split(len(w)))])
    losses, logs = each_d(t, [(x_real, x_fake, None, weight)] * len(t.D.nets))
    paid, logs["entropy_v"] = weighed(losses, t.D, t.cfg.mix_entropy)
    return paid, logs


def pooled(t, x_real, x_fake):
    """T losses that have nothing in common: each D has reals, and fakes of its G, of its own."""
    losses, logs = each_d(t, zip(*(x.tensor_split(len(t.D.nets)) for x in (x_real, x_fake))))
    return losses.sum(), logs


def g_loss(t):
    """sum_ij w_i v_j (loss of G_i's images under D_j), and w's entropy term; pooled: the trace."""
    x, of_g, n = t.G(t.latent(t.cfg.batch)), core.LOSSES[t.cfg.loss][2], len(t.G.nets)
    if t.cfg.arm == "pooled":
        return sum(of_g(D(part)).mean() for D, part in zip(t.D.nets, x.tensor_split(n))), {}
    payoffs = torch.stack([torch.stack([part.mean() for part in of_g(D(x)).tensor_split(n)])
                           for D in t.D.nets], 1)               # (components, discriminators)
    paid, entropy = weighed(payoffs @ t.D.weights().detach(), t.G, t.cfg.mix_entropy)
    return paid, {"entropy_w": entropy}


ARMS = {"vanilla": core.d_loss, "mix": mix, "wide": core.d_loss, "pooled": pooled, "many-g": mix,
        "many-d": mix, "frozen": mix}   # d_loss(t, x_real, x_fake) -> (loss, {name: tensor})
SEVERAL = {"mix": "GD", "pooled": "GD", "many-g": "G", "many-d": "D", "frozen": "GD"}


def networks(cfg):
    """G and D of a run, a Mixture each in the arms of SEVERAL, whose z has one entry more."""
    if cfg.arm not in SEVERAL:
        return neighbours.pair(cfg)
    nets = zip(*(neighbours.pair(Namespace(**vars(cfg) | {
        "z_dim": cfg.z_dim - 1, "seed": cfg.seed + 1000 * k})) for k in range(cfg.components)))
    return [Mixture(several if kind in SEVERAL[cfg.arm] else several[:1], learn=cfg.arm not in (
        "frozen", "pooled")) for kind, several in zip("GD", nets)]


def make_trainer(cfg, x):
    """A core.Trainer; the first parameter of a mixture, its logits, has a step size of its own."""
    def adam(params, lr, betas):
        logits, *rest = params
        return core.adam([{"params": [logits], "lr": cfg.lr_w}, {"params": rest}], lr, betas)
    own = {"optimizer": adam, "g_loss": g_loss} if cfg.arm in SEVERAL else {}
    t = core.Trainer(cfg, x.to(harness.pick_device(cfg.device)), *networks(cfg), ARMS[cfg.arm],
                     **own)
    for D in t.D.nets if own and cfg.precision == "bf16" else ():   # they are called one by one
        core.in_bf16(D)
    return t


def label(x, cfg):
    """What of x (n, ...) can coincide: nearest modes, exactly correct images, or all of it."""
    if x.dim() == 2:
        return torch.cdist(x, neighbours.modes(cfg.dataset)[0].to(x)).argmin(1)
    if cfg.dataset == "geometry":
        return geometry.pack(x[geometry.has_two(x, cfg.size // 4, geometry.count_exact)])
    return x.flatten(1)


def overlap(labels):
    """sum p q / sqrt(sum p^2 sum q^2) of laws, the mean over pairs of them, by how often labels
    (n, ...) of their draws coincide. None for one law, or if one never coincides with itself."""
    kinds, index = torch.unique(torch.cat(labels), dim=0, return_inverse=True)
    counts = torch.stack([v.bincount(minlength=len(kinds)) for v in index.split(
        [len(v) for v in labels])]).double()
    same = counts @ counts.T - counts.sum(1).diag()     # no draw is a pair with itself
    cosines = same / torch.outer(same.diag(), same.diag()).sqrt()
    cosines = cosines[*torch.triu_indices(len(same), len(same), 1)]
    return cosines.mean().item() if len(cosines) and cosines.isfinite().all() else None


def run(cfg, folder):
    """Train one arm with one seed, from scratch or from its checkpoint, and score it -> its row."""
    x, score, protocol = neighbours.prepare(cfg)
    t, mixture = make_trainer(cfg, x), cfg.arm in SEVERAL
    ended = neighbours.fit(t, folder, score, protocol)
    rows, n = harness.read_rows(folder / "metrics.jsonl"), 1000 if x.dim() == 2 else 36
    with harness.atomic(folder / "samples.npz") as tmp:
        np.savez(tmp, samples=t.preview(n).cpu(), component=t.G.pick(t.latents(
            n, seed=1)).cpu() if mixture else np.zeros(n, int))
    nets = t.G.nets if mixture else [t.G]
    parts = [torch.cat(list(core.generate(*each))) for each in zip(nets, t.latents(
        cfg.n_end * len(nets), seed=2)[:, int(mixture):].split(cfg.n_end))]
    return {"dataset": cfg.dataset, "arm": cfg.arm, "seed": cfg.seed, "steps": t.step, **protocol,
            "components": cfg.components, **score(torch.cat(list(t.fakes(cfg.n_end)[""]))),
            "parts": [score(x) for x in parts], "overlap": overlap([label(x, cfg) for x in parts]),
            **{k: net.weights().tolist() for k, net in (("w", t.G), ("v", t.D)) if mixture},
            "n_weights": sum(p.numel() for net in (t.G, t.D) for p in net.parameters()),
            **cost(t), **ended, "entropy": [
                [r["step"], r["entropy_w"], r["entropy_v"]] for r in rows if "entropy_w" in r]}


def cost(t, n=20):
    """Seconds of an update, the fastest of n, and of the whole training; its calls of D, an image
    each."""
    calls = []
    for net in getattr(t.D, "nets", [t.D]):
        net.register_forward_hook(lambda net, args, out: calls.append(len(out)))
    seconds = harness.update_seconds(t, n)
    return {"seconds": t.cfg.steps * seconds, "update_seconds": seconds,
            "d_calls": t.cfg.steps * sum(calls) // n}


def distances(cfg, folder):
    """Between two samples of N(0, I/d), m points each, a row for each line of the figure: W1; the
    gap of a trained D; the same D's on fresh points; the corollary's, from a sample to the law."""
    now, rows = harness.versions(), []
    harness.write_json(folder / "config.json", {"flags": cfg, **now, "git": [now["git"] or ""]})
    torch.manual_seed(cfg.seed)

    def draw(m, d=64):
        return torch.randn(m, d) / d ** 0.5

    def trained(x, other, hidden):      # a D to tell points x from those of other()
        D = nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 1), nn.Sigmoid())
        opt = core.adam(D.parameters(), 1e-2, (0.9, 0.999))
        for _ in range(cfg.updates):
            opt.zero_grad()
            (D(other()).mean() - D(x).mean()).backward()
            opt.step()
        return D.requires_grad_(False)

    def gaps(m, hidden):
        x, y, new, newer = draw(m), draw(m), draw(20_000), draw(20_000)
        D, E = (trained(x, other, hidden) for other in (lambda: y, lambda: draw(max(m, 1024))))
        return [(net(a).mean() - net(b).mean()).item()
                for net, a, b in ((D, x, y), (D, new, newer), (E, x, new))]
    for d in cfg.w1_d:
        apart = [torch.cdist(draw(m, d), draw(m, d)).numpy() for m in cfg.w1_m]
        rows.append((W1, f"d = {d}", cfg.w1_m, [a[linear_sum_assignment(a)].mean() for a in apart]))
    for hidden in cfg.hidden:
        rows += [(key, f"p = {66 * hidden + 1}", cfg.gap_m, y) for key, y in zip(
            GAPS, zip(*(gaps(m, hidden) for m in cfg.gap_m)))]
    return [{"seed": cfg.seed, **dict(zip(("what", "line", "m", "y"), row))} for row in rows]


def claims_distance(rows):
    """W1 of two samples stays large; how fast the gap of a trained D falls. The theorem bounds it
    by about sqrt(p / m), times a constant that is not known: no slope contradicts that."""
    for what, line in dict.fromkeys((r["what"], r["line"]) for r in rows):
        seeds = [np.array([r["m"], r["y"]]) for r in rows if (r["what"], r["line"]) == (what, line)]
        # Of a sample smaller than p, the number of its weights, a D may know every point.
        known = [v[:, v[0] > int(line.split()[-1])] for v in seeds]
        if what == W1:
            ends = [v[1, -1] for v in seeds]
            yield (f"{W1} of N(0, I/d), {line}, {seeds[0][0, -1]:,.0f} points each, above 1.1", "",
                   sweep.spread(ends), sweep.verdict(ends, [1.1, 1.1]))
        elif what == GAPS[0] and known[0].shape[1] > 1:
            yield (f"slope of ln gap over ln m, D with {line} < m weights", "", sweep.spread(
                [np.polyfit(*np.log(v), 1)[0] for v in known]), "")


def claims(rows):
    """Does mix beat one pair of its size, and as many GANs pooled? A claim for each measure."""
    found, arms = [], list(dict.fromkeys(r.get("arm") for r in rows))
    for key, (words, unit) in neighbours.MEASURES.get(rows[0].get("dataset"), {}).items():
        if all(r.get(key) is not None for r in rows):
            ends = {arm: sweep.values(rows, key, arm=arm) for arm in arms}
            ours = ", ".join(sweep.spread(v, unit) for v in ends.values())
            found.append((f"{rows[0]['dataset']}, T = {rows[0]['components']}: "
                          f"{words.format(**rows[0])} of {', '.join(arms)}", "mix is best",
                          f"{ours}; n={len(ends[arms[0]])}",
                          sweep.beside(ends, "mix", key not in neighbours.LOWER)))
    return [{"paper": "MIX+GAN", **dict(zip(("what", "theirs", "ours", "verdict"), claim)),
             "front": False}
            for claim in (found if "arm" in rows[0] else claims_distance(rows))]


def plot_distance(rows, folder):
    """A panel for each distance, over the number of points -> figure."""
    fig = harness.figure(2.4)
    axes = dict(zip((W1, *GAPS), fig.subplots(1, 4, width_ratios=[1.3, 1, 1, 1])))
    axes[W1].axhline(1.1, color="grey", ls=":", label="1.1")
    for what, line in dict.fromkeys((r["what"], r["line"]) for r in rows):
        seeds = [np.array([r["m"], r["y"]]) for r in rows if (r["what"], r["line"]) == (what, line)]
        harness.band(axes[what], seeds, line, marker=".", **harness.style(line))
        axes[what].set(title=what, xlabel="points m", xscale="log", **(
            {} if what == W1 else {"ylim": (-0.1, 1)}))
    axes[W1].legend(), axes[GAPS[1]].legend()
    return fig


def plot_arms(rows, folder):
    """What each arm draws, a colour for each component, and its weights w; its score -> figure."""
    (words, _), *_ = neighbours.MEASURES[rows[0]["dataset"]].values()
    arms = {r["arm"]: [q for q in rows if q["arm"] == r["arm"]] for r in rows}
    fig = harness.figure(4)
    axes = fig.subplot_mosaic([[*arms], ["score"] * len(arms)], height_ratios=[1, 1.8])
    for arm, mine in arms.items():
        with np.load(folder / f"{arm}-s{mine[0]['seed']}" / "samples.npz") as saved:
            x, component = saved["samples"], saved["component"]
        if x.ndim == 4:
            x = x[component.argsort(kind="stable")]
        neighbours.show(axes[arm], x, mine[0]["dataset"], arm, [f"C{i}" for i in component])
        weights = " ".join(f"{100 * w:.0f}" for w in mine[0].get("w", [1]))
        axes[arm].set_xlabel(f"w = {weights}%")
        harness.band(axes["score"], [[*zip(*r["curve"])] for r in mine], arm, marker=".",
                     **harness.style(arm))
    axes["score"].legend()
    axes["score"].set(xlabel="updates of G", title=words.format(**rows[0]))
    return fig


def plot(folder):
    """figure.png from the files."""
    result = sweep.read_result(folder, Path(__file__).stem)
    draw = plot_arms if "arm" in result["rows"][0] else plot_distance
    harness.save_figure(draw(result["rows"], folder), folder)
    return result


def configure(args):
    """A configuration for each run; pooled has batches for all, wide as many weights as mix."""
    args.arms, args.seeds = args.arms or list(ARMS), args.seeds or [0]
    if args.part == "distance":
        return [Namespace(**DISTANCE.get(args.preset, DISTANCE["cpu"]), part="distance", seed=seed,
                          seeds=args.seeds, device=args.device, run=f"s{seed}")
                for seed in args.seeds]
    presets = neighbours.PRESETS[args.dataset]
    cfg = sweep.resolve(args, OWN, COMMON, presets["paper"], presets[args.preset],
                        channels=3 if args.dataset == "cifar10" else 1)

    def n_weights(width):
        with torch.device("meta"):
            nets = neighbours.pair(Namespace(**vars(cfg) | {"width": width, "seed": 0}))
        return sum(p.numel() for net in nets for p in net.parameters())
    own = {arm: {"z_dim": cfg.z_dim + 1} for arm in SEVERAL}
    own["pooled"]["batch"] = cfg.components * cfg.batch
    own["wide"] = {"width": 1 + bisect.bisect_left(range(
        1, cfg.components * cfg.width), cfg.components * n_weights(cfg.width), key=n_weights)}
    return [Namespace(**vars(cfg) | own.get(arm, {}), arm=arm, seed=seed, run=f"{arm}-s{seed}")
            for seed in cfg.seeds for arm in cfg.arms]


def main(argv=None):
    p = sweep.parser(__doc__, neighbours.PRESETS["ring"], OWN, ARMS)
    p.set_defaults(dataset="grid", part="gan", data_dir=data.DATA_DIR)
    args = sweep.parse(p, __file__, argv)
    if args.plot:
        return plot(args.plot)
    if args.sample:
        return harness.sample(args, networks)
    runs, alone = configure(args), args.part == "distance"
    if sweep.announce(runs, args.dry_run, None if alone else run):
        return {}
    if not alone and not sweep.worker():    # what is missing or wrong shows here, before any file
        core.check_batch(max(runs, key=lambda cfg: cfg.batch), len(neighbours.prepare(runs[0])[0]))
    folder, rows = sweep.train_all(args, f"{args.part if alone else args.dataset}-{args.preset}",
                                   runs, distances if alone else run)
    sweep.write_result(args, folder, runs, rows, claims(rows))
    return plot(folder)


if __name__ == "__main__":
    harness.cli(main)
