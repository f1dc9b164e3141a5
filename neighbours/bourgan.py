"""BourGAN (Xiao, Zhong, Zheng 2018): a latent law made from the data's own distances.

By Bourgain's theorem m points of any metric embed in O(log^2 m) dimensions with a distortion of
O(log m). Latents are drawn around embedded training points, and distances of latents are asked to
be those of what G makes of them. Is it the embedding that cures?

    python -m neighbours.bourgan --dataset grid --seeds 0 1 2
    python -m neighbours.bourgan --dataset geometry --part metric --seeds 0 1 2

Arms: a law of latents (gaussian; Gaussians around random centres; around the embedding, bourgain)
without or with (+d) the distance term; with it permuted, each coordinate of the embedding shuffled,
and points, training points in its place. Data: those of mix_gan.py.
The part `metric` trains nothing: it says what the embedding keeps of a metric's distances.
Presets: paper (one GPU), cpu (the first six arms: ten minutes a seed on a core), smoke (seconds).
"""
import math
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from scipy.stats import wasserstein_distance as w1
from torch import nn

import core
import data
import fid
import geometry
import harness
import neighbours
import sweep

# UNSPECIFIED: how many training points are embedded; the authors' code takes all of its 1,250. And
# the distance term beside a critic's loss, whose unit is another: beta is the same.
COMMON = neighbours.COMMON | dict(n_points=1024, repeats=5, sigma=0.01, beta=0.1, scale="ours")
FEW = {"smoke": dict(n_points=32)}
LAST = {"w1": ("W1 of log distances", 1)}
MEASURES = {kind: m | LAST for kind, m in neighbours.MEASURES.items()}  # of what G draws
KEPT = {"correlation": ("correlation of log distances", 1),             # and of an embedding
        "variance": ("variance of log ratio", 1)} | LAST
LOWER = (*neighbours.LOWER, "w1", "variance")       # less is better
METRIC = {"geometry": ("corners", "l2"), "cifar10": ("l2", "inception")}    # the first by default
OWN = {
    "part": (("gan", "metric"), "(%(default)s)"),
    "metric": (("l2", "corners", "inception"), "distance of training points that is embedded"),
    "n_points": (int, 2, 10 ** 5, "m, training points that are embedded, all different"),
    "repeats": (int, 1, 1000, "random sets of a size; latents have ceil(log2 m) times as many"),
    "sigma": (float, 0, 10 ** 6, "deviation of a Gaussian of latents; that of all centres is 1"),
    "beta": (float, 0, 10 ** 6, "weight of the distance term"), **neighbours.OWN,
    "scale": (("ours", "code"), "of latent distances: closed form, or as the authors' code")}
ARMS = {law + end: (law, bool(end)) for law in ("gaussian", "centres", "bourgain")  # law, term
        for end in ("", "+d")} | {law: (law, True) for law in ("permuted", "points")}
COLOURS = dict(gaussian="C7", centres="C0", bourgain="C1", permuted="C4", points="C2")


def flat(x):
    """Points as they are, images in [-1, 1], as rows (N, F)."""
    return (core.to_float(x) if x.dtype == torch.uint8 else x).flatten(1)


def apart(x):
    """L2 distances (N, N) of rows x (N, F), in float64."""
    return torch.cdist(x.double(), x.double()).fill_diagonal_(0)


def corners(x):
    """Distances (N, N) of images of two squares: L2 of their corners, (row, column) in pixels,
    under the better of the two matchings. A metric, as to swap two corners moves no distance."""
    lit = nn.functional.pad(geometry.lit(x), (1, 0, 1, 0))
    at = (lit[..., 1:, 1:] & ~lit[..., :-1, 1:] & ~lit[..., 1:, :-1]).nonzero()[:, 2:].double()
    a, b = at.unflatten(0, (len(x), 2)), at.unflatten(0, (len(x), 2)).flip(1)
    return torch.minimum(apart(a.flatten(1)), torch.cdist(a.flatten(1), b.flatten(1)))


def marginals(x):
    """Images (N, 1, H, W) summed over rows and over columns, then cumulated: rows (N, H + W)."""
    x = flat(x).unflatten(1, x.shape[2:])
    return torch.cat([x.mean(2).cumsum(1), x.mean(1).cumsum(1)], 1)


# DEVIATION: two metrics in one method. What G draws has no corners until it is right, and Inception
# would cost more than the GAN: the distance term takes what has a gradient, and a scale of its own.
METRICS = {     # distances that are embedded; features whose L2 distance the distance term takes
    "l2": (lambda x, cfg: apart(flat(x)), flat), "corners": (lambda x, cfg: corners(x), marginals),
    "inception": (lambda x, cfg: apart(fid.features(fid.load_inception(
        cfg.dims, cfg.fid_weights, cfg.data_dir), x.split(fid.BATCH), keep=True)[1]), flat)}


def bourgain(d, repeats, gen):
    """Bourgain's embedding (m, K) of m points at distances d (m, m), K = repeats * ceil(log2 m).
    A coordinate, 1-Lipschitz, is the distance to the nearest point of a random set, which has each
    point with probability 2^-j, j = 1, ..., ceil(log2 m)."""
    columns = []
    for j in sorted([*range(1, math.ceil(math.log2(len(d))) + 1)] * repeats):
        inside = torch.zeros(len(d), dtype=bool)
        # DEVIATION: a set of no point, or of all, is drawn again; from it all are equally far.
        while not 0 < inside.sum() < len(d):
            inside = torch.rand(len(d), generator=gen) < 0.5 ** j
        columns.append(d[:, inside].amin(1))
    return torch.stack(columns, 1)


def log_pairs(d):
    """Logarithms (m (m - 1) / 2,) of the distances d (m, m) of all pairs, of at least 1e-6."""
    return d[*torch.triu_indices(len(d), len(d), 1)].clamp(min=1e-6).log()


def log_scale(log_d, log_e, how):
    """ln of the scale of latents, from the logarithms of all pairs' distances: `ours` minimises the
    mean of (ln d - ln(scale |e|))^2; `code` is max sqrt(d / |e|), as in the authors' code."""
    # DEVIATION: by default the closed form. The code's is the root of a maximum, and has a unit.
    return (log_d - log_e).mean() if how == "ours" else (log_d - log_e).max() / 2


def distance_term(y, y2, z, z2, log_scale):
    """Mean of (ln |y - y2| - ln(scale |z - z2|))^2 over pairs of rows (B, F), b with b -> scalar.
    A norm of 0 counts as 1e-6, and has a gradient, 0."""
    log_y, log_z = (((a - b).square().sum(1) + 1e-12).log() / 2 for a, b in ((y, y2), (z, z2)))
    return (log_y - log_z - log_scale).square().mean()


def g_loss(t):
    """G's loss of eq. (1) and, in arms with it, beta times the distance term of its batch y beside
    another, y', which D does not see; its gradient passes through both."""
    z, prior, features = t.latent(t.cfg.batch), t.G[0], METRICS[t.cfg.metric][1]
    y = t.G(z)
    loss = core.LOSSES[t.cfg.loss][2](t.D(y)).mean()
    if not ARMS[t.cfg.arm][1]:
        return loss, {}
    other = t.latent(t.cfg.batch)
    term = distance_term(features(y), features(t.G(other)), prior(z), prior(other), prior.log_scale)
    return loss + t.cfg.beta * term, {"distance_term": term}


def networks(cfg):
    """G, which begins with a neighbours.Prior, its centres still to be filled in, and D."""
    mixture = ARMS[cfg.arm][0] != "gaussian"
    k = cfg.z_dim - mixture
    G, D = neighbours.pair(Namespace(**vars(cfg) | {"z_dim": k}))
    return nn.Sequential(neighbours.Prior(cfg.n_points * mixture, k, cfg.sigma), G), D


def embed(cfg, x, law):
    """Of the training data x (N, ...): m different ones, as equal ones have no logarithm of their
    distance; their distances d (m, m); centres e (m, K) of a law, of `gaussian` draws of it; ln of
    the scale, by the distance that the term takes. UserError if there are too few."""
    distance, features = METRICS[cfg.metric]
    x, gen = torch.unique(x, dim=0), core.generator(cfg.seed)
    if len(x) < cfg.n_points:
        raise core.UserError(f"--n-points {cfg.n_points}: only {len(x)} different training data")
    x = x[torch.randperm(len(x), generator=gen)[:cfg.n_points]]
    d, k = distance(x, cfg), cfg.repeats * math.ceil(math.log2(len(x)))
    e = (flat(x) if law == "points" else bourgain(d, cfg.repeats, gen) if law in (
        "bourgain", "permuted") else torch.randn(len(x), k, generator=gen)).double()
    if law == "permuted":
        e = torch.stack([column[torch.randperm(len(x), generator=gen)] for column in e.T], 1)
    if law != "gaussian":   # a mean of 0, and a mean square of 1 over all coordinates
        e = (e - e.mean(0)) / (e - e.mean(0)).square().mean().sqrt()
    return x, d, e, log_scale(log_pairs(apart(features(x))), log_pairs(apart(e)), cfg.scale)


def make_trainer(cfg, x):
    G, D = networks(cfg)
    *_, e, G[0].log_scale[...] = embed(cfg, x, ARMS[cfg.arm][0])
    G[0].e[...] = e[:len(G[0].e)]
    return core.Trainer(cfg, x.to(harness.pick_device(cfg.device)), G, D, g_loss=g_loss)


def held_out(cfg, n):
    """More draws of the law of n training data; for CIFAR-10 the other split."""
    if cfg.dataset in neighbours.PLANES:
        return neighbours.draw_points(cfg.n_train, cfg.dataset, seed=1)
    if cfg.dataset == "geometry":
        return geometry.draw(n, 2, cfg.size, cfg.size // 4, seed=1)
    other = "train" if cfg.split == "test" else "test"
    return data.load(cfg.dataset, cfg.size, cfg.data_dir, other)


def beside_held(x, train, held):
    """Samples x beside as many training and held-out data. near: median L2 to the nearest of the
    former, as a share of that to the latter: 1, or near 0 if G learned by heart. w1: of logarithms
    of all pairs' distances; w1_floor: between training and held-out data."""
    train, held = train[:len(held)], held[:len(train)].to(x.device)
    near, far = (torch.cdist(flat(x[:1000]).double(), flat(some).double()).amin(1).median().item()
                 for some in (train, held))
    ours, seen, new = (log_pairs(apart(flat(some[::-(-len(some) // 500)])).cpu())
                       for some in (x, train, held))
    return {"near": near / max(far, 1e-9), "w1": w1(ours, new), "w1_floor": w1(seen, new)}


def run(cfg, folder):
    """Train one arm with one seed, from scratch or from its checkpoint, and score it -> its row."""
    x, score, protocol = neighbours.prepare(cfg)
    t = make_trainer(cfg, x)
    ended = neighbours.fit(t, folder, score, protocol)
    with harness.atomic(folder / "samples.npz") as tmp:
        np.savez(tmp, samples=t.preview(1000 if x.dim() == 2 else 36).cpu())
    x = torch.cat(list(t.fakes(cfg.n_end)[""]))
    return {"dataset": cfg.dataset, "arm": cfg.arm, "seed": cfg.seed, "steps": t.step, **protocol,
            "embedded": cfg.metric, "sigma": cfg.sigma, "m": cfg.n_points, "z_dim": cfg.z_dim,
            "scale": t.G[0].log_scale.exp().item(), **score(x),
            **beside_held(x, t.data, held_out(cfg, len(t.data))), **ended,
            "update_seconds": harness.update_seconds(t)}


def measure(cfg, folder):
    """What an embedding, and random centres, keep of a metric -> a row each. w1: between latents
    and held-out data. of_term: correlation with the distance that the distance term takes."""
    now, rows, (distance, features) = harness.versions(), [], METRICS[cfg.metric]
    harness.write_json(folder / "config.json", {"flags": cfg, **now, "git": [now["git"] or ""]})
    images = neighbours.training(cfg)
    held, gen = held_out(cfg, len(images)), core.generator(cfg.seed)
    held = held[torch.randperm(len(held), generator=gen)[:1000]]
    one, other = (log_pairs(distance(half, cfg)) for half in (held[::2], held[1::2]))
    for law in ("bourgain", "centres"):
        x, d, e, _ = embed(cfg, images, law)
        log_d, log_e, term = map(log_pairs, (d, apart(e), apart(features(x))))
        z = e[torch.randint(len(e), held[::2].shape[:1], generator=gen)]
        log_z = log_pairs(apart(z + cfg.sigma * torch.randn(z.shape, generator=gen)))
        rows.append({
            "dataset": cfg.dataset, "embedded": cfg.metric, "sigma": cfg.sigma, "arm": law,
            "seed": cfg.seed, "m": len(x), "correlation": np.corrcoef(log_d, log_e)[0, 1],
            "variance": (log_d - log_e).var().item(), "of_term": np.corrcoef(log_d, term)[0, 1],
            "w1": w1(log_z + log_scale(log_d, log_e, cfg.scale), one), "w1_floor": w1(other, one)})
    return rows


QUESTIONS = {   # what it says if the first of two arms is better
    "the embedding cures": ("bourgain", "centres"), "with the term": ("bourgain+d", "centres+d"),
    "the law cures": ("bourgain", "gaussian"), "the term cures": ("gaussian+d", "gaussian"),
    "the law does more than the term": ("bourgain", "gaussian+d"), "its geometry cures": (
        "bourgain+d", "permuted"), "more than points would": ("bourgain+d", "points")}


def claims(rows):
    """For each metric: each measure of all arms, and each question; whether G learned by heart."""
    found = []
    for metric in dict.fromkeys(r["embedded"] for r in rows):
        mine = [r for r in rows if r["embedded"] == metric]
        one, lines, arms = mine[0], [], list(dict.fromkeys(r["arm"] for r in mine))
        head = f"{one['dataset']}, {metric}, sigma {one['sigma']:g}: "
        of = {k: {arm: sweep.values(mine, k, arm=arm) for arm in arms} for k in one}
        said = {k: v for k, v in (KEPT if "of_term" in one else MEASURES[one["dataset"]]).items()
                if all(r.get(k) is not None for r in mine)}
        best = "bourgain+d" if "bourgain+d" in arms else "bourgain"
        for i, (k, (words, unit)) in enumerate(said.items()):
            ours = {arm: sweep.spread(v, unit) for arm, v in of[k].items()}
            floor = f"; held-out {sweep.spread(sweep.values(mine, 'w1_floor'))}" * (k == "w1")
            words = words.format(**one)
            lines.append((f"{words} of {', '.join(arms)}", f"{best} is best", ", ".join(
                ours.values()) + f"{floor}; n={len(of[k][arms[0]])}", sweep.beside(
                    of[k], best, k not in LOWER)))
            lines += [(f"{words} of {a}, {b}", answer, f"{ours[a]}, {ours[b]}", sweep.verdict(
                of[k][a], of[k][b], k not in LOWER)) for answer, (a, b) in QUESTIONS.items()
                if i < 1 + (answer == "the embedding cures") and {a, b} <= set(arms)
                and "near" in one]
        for k, words, most in (("near", "distance to training data as a share of that to held-out",
                                0.5), ("n_eff", "effective number of samples", 2 * one["m"])):
            ends = {arm: v for arm, v in of.get(k, {}).items() if None not in v}
            lines += [(f"{words}, of {', '.join(ends)}", f"below {most:g} if m = {one['m']} are "
                       "learned by heart", ", ".join(map(sweep.spread, ends.values())),
                       sweep.beside(ends | {"": [most] * len(mine)}, "", True).replace(
                           "against", "for"))] * bool(ends)
        found += [{"paper": "BourGAN", "what": head + what, "theirs": theirs, "ours": ours,
                   "verdict": verdict, "front": False}
                  for what, theirs, ours, verdict in lines]
    return found


def plot_arms(rows, folder):
    """What each arm draws; its score, dotted without the term; whether it was learned by heart,
    open circles without the term."""
    kept = "n_eff" if any(r.get("n_eff") for r in rows) else [*MEASURES[rows[0]["dataset"]]][0]
    arms = {r["arm"]: [q for q in rows if q["arm"] == r["arm"]] for r in rows}
    fig, n = harness.figure(4), len(arms)
    axes = fig.subplot_mosaic([[arm for arm in arms for _ in "12"], ["score"] * n + ["end"] * n],
                              height_ratios=[1, 2.5])
    for arm, mine in arms.items():
        x = np.load(folder / f"{arm}-s{mine[0]['seed']}" / "samples.npz")["samples"]
        colour = COLOURS[ARMS[arm][0]]
        neighbours.show(axes[arm], x, mine[0]["dataset"], arm, colour)
        harness.band(axes["score"], [[*zip(*r["curve"])] for r in mine], arm, color=colour,
                     ls="-" if ARMS[arm][1] else ":", marker=".")
        axes["end"].scatter([r["near"] for r in mine], [r[kept] or np.nan for r in mine], 16,
                            colour if ARMS[arm][1] else "none", edgecolors=colour)
    words = [*MEASURES[rows[0]["dataset"]].values()][0][0].format(**rows[0])
    axes["score"].set(xlabel="updates of G", title=words)
    axes["end"].set(xlabel="distance to training data over that to held-out", title=words)
    axes["end"].axvline(1, color="grey", ls=":")
    if kept == "n_eff":
        axes["end"].set(title="effective number of samples, open: without +d", yscale="log")
        axes["end"].axhline(rows[0]["m"], color="grey", ls="--", label="m embedded points")
        axes["end"].legend()
    axes["score"].legend(ncols=2)
    return fig


def plot(folder):
    """figure.png from the files; of the part metric a panel for each measure, a dot a seed."""
    rows = (result := sweep.read_result(folder, Path(__file__).stem))["rows"]
    if "of_term" not in rows[0]:
        fig = plot_arms(rows, folder)
    else:
        axes = (fig := harness.figure(2)).subplots(1, len(KEPT))
        for ax, (key, (words, _)) in zip(axes, KEPT.items()):
            for law in ("bourgain", "centres"):
                x, y = zip(*((r["embedded"], r[key]) for r in rows if r["arm"] == law))
                ax.scatter(x, y, 12, COLOURS[law], label=law)
            ax.set(title=words, xmargin=0.5)
        axes[0].legend()
    harness.save_figure(fig, folder)
    return result


def configure(args):
    """A configuration for each run; the size of latents is that of an arm's law."""
    args.arms, args.seeds = args.arms or list(ARMS), args.seeds or [0]
    kind, suited = args.dataset, METRIC.get(args.dataset, ("l2",))
    if args.split == "all":
        raise core.UserError("--split all: no image would be held out")
    if args.z_dim or args.metric not in (None, *suited):
        raise core.UserError(f"--z-dim follows from --n-points and --repeats; --metric of {kind}: "
                             f"{', '.join(suited)}")
    presets = neighbours.PRESETS[kind]
    cfg = sweep.resolve(args, OWN, COMMON, dict(metric=suited[0]), presets["paper"],
                        presets[args.preset], FEW.get(args.preset, {}), z_dim=1,
                        channels=3 if kind == "cifar10" else 1)
    if args.part == "metric":   # Inception, for its weights and time, only if it is asked for
        metrics = [args.metric] if args.metric else [m for m in suited if m != "inception"]
        return [Namespace(**vars(cfg) | {"metric": metric}, seed=seed, run=f"{metric}-s{seed}")
                for metric in metrics for seed in cfg.seeds]
    k = cfg.repeats * math.ceil(math.log2(cfg.n_points))
    of_point = 2 if kind in neighbours.PLANES else cfg.channels * cfg.size ** 2
    wide = {"gaussian": k, "points": 1 + of_point}
    return [Namespace(**vars(cfg) | {"z_dim": wide.get(ARMS[arm][0], k + 1)}, arm=arm, seed=seed,
                      run=f"{arm}-s{seed}") for seed in cfg.seeds for arm in cfg.arms]


def main(argv=None):
    p = sweep.parser(__doc__, neighbours.PRESETS["ring"], OWN, ARMS)
    p.set_defaults(dataset="grid", part="gan", data_dir=data.DATA_DIR)
    args = sweep.parse(p, __file__, argv)
    if args.plot:
        return plot(args.plot)
    if args.sample:
        return harness.sample(args, networks)
    runs, alone = configure(args), args.part == "metric"
    if sweep.announce(runs, args.dry_run, None if alone else run):
        return {}
    if not alone and not sweep.worker():    # what is missing or wrong shows here, before any file
        core.check_batch(runs[0], len(neighbours.prepare(runs[0])[0]))
    name = f"{'metric-' * alone}{args.dataset}-{args.preset}"
    folder, rows = sweep.train_all(args, name, runs, measure if alone else run)
    sweep.write_result(args, folder, runs, rows, claims(rows))
    return plot(folder)


if __name__ == "__main__":
    harness.cli(main)
