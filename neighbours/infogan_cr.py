"""InfoGAN-CR and ModelCentrality (Lin, Thekumparampil, Fanti, Oh 2020), where factors are known.

Some latents are codes. InfoGAN asks that a network Q can read them off an image; the contrastive
regulariser, that CR can tell which code two images share. ModelCentrality picks, without labels,
the model with whose codes the others agree. Are independent codes a price for dependent factors?

    python -m neighbours.infogan_cr --dataset halves --seeds 0 1 2
    python -m neighbours.infogan_cr --dataset free --seeds 0 1 2

Published for dSprites: a FactorVAE score of 0.82 without CR, 0.88 with it, 0.92 if picked so.
Arms: gan, whose Q only looks on; infogan; infogan-cr; early, CR's term on from the start; shuffled,
its labels shuffled; unused, CR trained for nothing; twice, the doubled G step without CR.
Data: two squares, one in each half, four independent factors (halves), or anywhere apart (free),
where codes that move a coordinate each, over its whole range, would draw 33% wrong images; or the
few of `free` that exp_sc.py trains on (geometry).
Presets: paper (one GPU), cpu (the first three arms on both sets: ten minutes a seed on a core),
smoke (seconds).
"""
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import nn

import core
import data
import geometry
import harness
import neighbours
import sweep

# UNSPECIFIED: weights beside a critic's loss, of another unit than the authors' logarithmic one,
# and when alpha is on. Alpha and no gap are those of their dSprites, most like our images; their
# teapots have a gap of 1.9, for 1.7 times as long as alpha is off.
COMMON = neighbours.COMMON | dict(codes=4, info_weight=1.0, cr_weight=2.0, cr_from=0.5, gap=0.0,
                                  gap_until=0.85, groups=500)
LENGTH = {"cpu": dict(steps=1500, groups=100), "smoke": dict(groups=10)}
OWN = {
    "codes": (int, 2, 100, "latents that are codes; the others are noise"),
    "info_weight": (float, 0, 10 ** 6, "weight of InfoGAN's term in G's loss"),
    "cr_weight": (float, 0, 10 ** 6, "alpha, weight of CR's term in G's loss once it is on"),
    "cr_from": (float, 0, 1, "share of the run after which it is on"),
    "gap": (float, 0, 1.99, "least difference of the codes that a pair does not share, at first"),
    "gap_until": (float, 0, 1, "share of the run after which the gap is 0"),
    "groups": (int, 2, 10 ** 5, "groups of images a model in ModelCentrality"), **neighbours.OWN,
    "dataset": (("halves", "free", "geometry"), "(%(default)s)")}
WITH_CR = dict(cr=True, g_steps=2)      # updates of G in a step
ARMS = {"gan": dict(cr=False, g_steps=1, info_weight=0.0), "infogan": dict(cr=False, g_steps=1),
        "infogan-cr": WITH_CR, "early": WITH_CR | dict(cr_from=0.0), "shuffled": WITH_CR,
        "unused": WITH_CR | dict(cr_weight=0.0), "twice": dict(cr=False, g_steps=2)}
MEASURES = {"factor_vae": ("FactorVAE score", 1), "mig": ("MIG", 1),
            "correct_exact": ("exactly correct images", 100)}


def uniform(t, n):
    """Latents (n, Z), codes first, all from U(-1, 1)."""
    return 2 * torch.rand(n, t.cfg.z_dim, generator=t.gen, device=t.device) - 1


def pairs(t, n, gap):
    """n pairs of latents that share a code and the noise: the first of all, then the second (2 n,
    Z), and which code (n,). Of another code both are from U(gap / 2 - 1, 1 - gap / 2); then the
    larger one is moved up by gap / 2, and the smaller one down, as in the authors' code."""
    k, same = t.cfg.codes, uniform(t, n)
    a, b = ((1 - gap / 2) * uniform(t, n)[:, :k] for _ in "ab")
    up = ((a > b).float() - 0.5) * gap
    shared = torch.randint(k, (n,), generator=t.gen, device=t.device)
    fixed = shared[:, None] == torch.arange(k, device=t.device)
    return torch.cat([torch.cat([torch.where(fixed, same[:, :k], c), same[:, k:]], 1)
                      for c in (a + up, b - up)]), shared


def scaled(x, weight):
    """x itself, through which a gradient arrives `weight` times as large."""
    return x.detach() + weight * (x - x.detach()) if weight else x.detach()


def schedule(cfg, step):
    """Weight alpha of CR's term, and the gap, at an update."""
    share = step / cfg.steps
    return cfg.cr_weight * (share >= cfg.cr_from), cfg.gap * (share < cfg.gap_until)


def contrast(t):
    """Cross-entropy of CR on pairs; G learns from alpha times as much of it as CR does."""
    alpha, gap = schedule(t.cfg, t.step)
    z, shared = pairs(t, t.cfg.batch, gap)
    if t.cfg.arm == "shuffled":
        shared = shared[torch.rand(len(shared), generator=t.gen, device=t.device).argsort()]
    # UNSPECIFIED: G's batch norm for pairs. Running statistics, as in scoring: with a gap, codes
    # have another law, which would be normalised away, and spoil the statistics of the prior's.
    x = scaled(t.G.eval()(z), alpha)
    t.G.train()
    return nn.functional.cross_entropy(t.extra["CR"](torch.cat(x.chunk(2), 1)), shared)


# DEVIATION: Q is a network of its own, as D is a critic, whose penalty would hold for it. Q and CR
# learn in G's update, from its images, not in one of their own before it, and have no spectral
# norm. The GAN is that of the other images here; theirs has a logarithmic loss and spectral norm.
def g_loss(t):
    """G's loss of eq. (1), and the losses of Q, -log N(codes; Q, 1) but for a constant, and CR,
    which they learn from in full and G by its weights."""
    x = t.G(z := t.latent(t.cfg.batch))
    read = t.extra["Q"](scaled(x, t.cfg.info_weight))
    logs = {"info": (read - z[:, :t.cfg.codes]).square().sum(1).mean() / 2}
    if t.cfg.cr:
        logs["contrast"] = contrast(t)
    return core.LOSSES[t.cfg.loss][2](t.D(x)).mean() + sum(logs.values()), logs


class Trainer(core.Trainer):
    """core's, with g_steps updates of G, and of what learns with it, in a step. CR and its Adam
    begin anew whenever alpha or the gap changes, as in the authors' code."""

    def g_update(self):
        cfg, now = self.cfg, schedule(self.cfg, self.step)
        if cfg.cr and self.step and now != schedule(cfg, self.step - 1):
            fresh = encoder(cfg, 2 * cfg.channels, cfg.seed + self.step)
            self.extra["CR"].load_state_dict(fresh.state_dict())
            self.opts[-1].state.clear()
        for _ in range(cfg.g_steps):
            logs = super().g_update()
        return logs


def encoder(cfg, channels, seed):
    """A network like D with an output for each code: (B, channels, H, W) -> (B, codes)."""
    cfg = Namespace(**vars(cfg) | dict(channels=channels, seed=seed, gp_weight=0.0))
    *trunk, last, _ = core.build(cfg)[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(*trunk, core.init(nn.Linear(last.in_features, cfg.codes), cfg.init_d))


def make_trainer(cfg, x):
    device, extra = harness.pick_device(cfg.device), {}
    for name, channels in (("Q", cfg.channels), ("CR", 2 * cfg.channels))[:1 + cfg.cr]:
        net = encoder(cfg, channels, cfg.seed).to(device, memory_format=torch.channels_last)
        extra[name] = net, core.adam(net.parameters(), cfg.lr_d, (cfg.beta1, cfg.beta2))
    return Trainer(cfg, x.to(device), *core.build(cfg), g_loss=g_loss, prior=uniform, extra=extra)


@torch.no_grad()
def encode(Q, x):
    """What Q reads off images x uint8 (N, C, H, W), batch by batch: float (N, codes)."""
    return torch.cat([Q(core.to_float(part.to(Q[-1].weight.device))) for part in x.split(1024)])


def factor_vae(z, fixed, scale):
    """FactorVAE score (Kim, Mnih 2018) of encodings z (n, m, C): in each group of m a factor is
    fixed (n,). A group votes for the code of least variance, in units of its deviation scale (C,)
    over all data; a code says the factor that it has most votes for. The score is the share of
    votes that are right. For a code that never moves there is no vote."""
    votes = (z.var(1) / scale ** 2).nan_to_num(torch.inf).argmin(1)
    table = torch.zeros(z.shape[2], fixed.max() + 1, device=z.device)
    table.index_put_((votes, fixed), table.new_ones(()), accumulate=True)
    return table.amax(1).sum().item() / len(z)


def entropy(x):
    """Of the law of rows x (N, ...), in nats."""
    counts = torch.unique(x, dim=0, return_counts=True)[1]
    return torch.special.entr(counts.double() / len(x)).sum().item()


def mig(z, factors, bins=20):
    """Mutual information gap (Chen et al. 2018) of encodings z (N, C), in `bins` of equal width,
    and factors, whole numbers (N, F): the mean over factors of the difference of the two codes that
    know most of it, as a share of its entropy."""
    low, high = z.amin(0), z.amax(0)
    z = ((z - low) / (high - low).clamp(min=1e-9) * bins).long().clamp(max=bins - 1)
    gaps = []
    for f in factors.T:
        *_, second, first = sorted(entropy(c) - entropy(torch.stack([c, f], 1)) for c in z.T)
        gaps.append((first - second) / entropy(f))
    return np.mean(gaps).item()


def disentanglement(z, factors, n=500, m=100):
    """Both scores of encodings z (N, C) of all images of a set, and their factors (N, F)."""
    gen, z, groups = core.generator(0), z.cpu(), []
    fixed = torch.randint(factors.shape[1], (n,), generator=gen)
    for k, at in zip(fixed, torch.randint(len(z), (n,), generator=gen)):
        same = z[factors[:, k] == factors[at, k]]
        groups.append(same[torch.randint(len(same), (m,), generator=gen)])
    return {"factor_vae": factor_vae(torch.stack(groups), fixed, z.std(0)), "mig": mig(z, factors)}


def misplaced(x, images, side):
    """Of images x (N, 1, H, W) that are two different squares anywhere, even one upon the other,
    the share that is none of `images`; None without any."""
    at = torch.cartesian_prod(*[torch.arange(x.shape[-1] - side + 1)] * 2)
    anywhere = geometry.render(at[torch.combinations(torch.arange(len(at)))], x.shape[-1], side)
    two = x[geometry.is_in(x, anywhere.to(x.device))]
    return 1 - geometry.is_in(two, images.to(x.device)).double().mean().item() if len(two) else None


@torch.no_grad()
def agreement(models, cfg, device):
    """S (M, M): the FactorVAE score of encoder i on groups of 100 images of generator j, in each of
    which one of its codes is fixed; models: M pairs (G, Q) on the device."""
    t = Namespace(cfg=cfg, gen=core.generator(0, device), device=device)
    columns, n, every = [], cfg.groups, torch.arange(cfg.groups, device=device)
    for G, _ in models:
        z = uniform(t, n * 100).unflatten(0, (n, 100))
        fixed = torch.randint(cfg.codes, (n,), generator=t.gen, device=device)
        z[every, :, fixed] = z[every, :1, fixed]
        x = torch.cat(list(core.generate(G, z.flatten(0, 1), 1024)))
        codes = [encode(Q, x) for _, Q in models]
        columns.append([factor_vae(c.unflatten(0, (n, 100)), fixed, c.std(0)) for c in codes])
    return torch.tensor(columns).T


def centrality(s):
    """ModelCentrality (M,) of scores s (M, M): the mean of (S + S') / 2 over the other models."""
    return ((s + s.T) / 2).fill_diagonal_(0).sum(1) / (len(s) - 1)


def run(cfg, folder):
    """Train one arm with one seed, from scratch or from its checkpoint, and score it -> its row."""
    x, score, protocol = neighbours.prepare(cfg)
    t = make_trainer(cfg, x)
    ended = neighbours.fit(t, folder, score, protocol)
    z = t.latents(1, seed=1).repeat(cfg.codes, 6, 1)    # one code after the other is moved
    z.diagonal(dim1=0, dim2=2).copy_(torch.linspace(-1, 1, 6)[:, None])
    with harness.atomic(folder / "samples.npz") as tmp:
        np.savez(tmp, samples=torch.cat(list(core.generate(t.G, z.flatten(0, 1)))).cpu())
    images, at = neighbours.squares(cfg.dataset, cfg.size)
    # UNSPECIFIED: factors of `free`, whose squares have no names. The first one is the upper one.
    trained, untrained = (disentanglement(encode(Q, images), at.flatten(1)) for Q in (
        t.extra["Q"], encoder(cfg, cfg.channels, cfg.seed).to(t.device)))
    ends = score(x := torch.cat(list(t.fakes(cfg.n_end)[""])))
    return {"dataset": cfg.dataset, "size": cfg.size, "arm": cfg.arm, "seed": cfg.seed,
            "steps": t.step, **protocol, "codes": cfg.codes, **trained, "untrained": untrained,
            **ends, "wrong": 1 - ends["correct_exact"], **ended,
            "misplaced": misplaced(x, images, cfg.size // 4),
            "update_seconds": harness.update_seconds(t)}


def add_centrality(rows, runs, folder):
    """Give each row of a finished sweep its ModelCentrality among all of them."""
    device, models = harness.pick_device(runs[0].device), []
    for cfg in runs:
        state = harness.read_checkpoint(folder / cfg.run / "ckpt.pt")
        G, Q = core.build(cfg)[0], encoder(cfg, cfg.channels, cfg.seed)
        G.load_state_dict(state["G"]), Q.load_state_dict(state["extra"]["Q"])
        models.append((G.to(device), Q.to(device)))
    for row, value in zip(rows, centrality(agreement(models, runs[0], device)).tolist()):
        row["centrality"] = value


QUESTIONS = {   # what it says if the first of two is better
    "InfoGAN's term helps": ("infogan", "gan"), "CR helps": ("infogan-cr", "infogan"),
    "by more than the doubled step": ("infogan-cr", "twice"), "by its labels": (
        "infogan-cr", "shuffled"), "by its gradient": ("infogan-cr", "unused"),
    "late better than from the start": ("infogan-cr", "early")}


def by_arm(rows, key):
    """The numbers of each arm and, where it is a score of Q, of Q at its first weights."""
    of = {arm: sweep.values(rows, key, arm=arm) for arm in dict.fromkeys(r["arm"] for r in rows)}
    if key in rows[0]["untrained"]:
        of["untrained"] = [*{r["seed"]: r["untrained"][key] for r in rows}.values()]
    return of


def rank(pairs):
    """Spearman's correlation over at least eight models as text, with the 95% interval of Bonett
    and Wright (2000), and a verdict on whether it is positive."""
    if len(pairs) < 8 or min(len({*v}) for v in zip(*pairs)) < 2:
        return f"n={len(pairs)}", "not decided (it takes eight different models)"
    r = spearmanr(*zip(*pairs)).statistic
    wide = 1.96 * ((1 + r ** 2 / 2) / (len(pairs) - 3)) ** 0.5
    low, high = np.tanh(np.arctanh(np.clip(r, -0.9999, 0.9999)) + [-wide, wide])
    return (f"{r:.2f} (95% interval {low:.2f} to {high:.2f}); n={len(pairs)}",
            "holds" if low > 0 else "in part" if r > 0 else "no")


def claims_free(rows):
    """What the prediction says of all images, and of those of two different squares wherever they
    are: it `holds` if every seed is within 5 points of it, `in part` if the mean is."""
    size, side = rows[0]["size"], rows[0]["size"] // 4
    n = (size - side + 1) ** 2      # places of a square
    for words, key, placements in (("wrong images", "wrong", n * n), (
            "too near, of images of two squares", "misplaced", n * (n - 1))):
        predicted = 1 - 2 * geometry.possible(size, side) / placements
        for arm, ours in by_arm(rows, key).items():
            if arm in ("gan", "infogan", "infogan-cr") and None not in ours:
                score = sweep.spread(sweep.values(rows, "factor_vae", arm=arm))
                off = np.abs(np.subtract(ours, predicted))
                yield (f"{words}, {arm}, of FactorVAE score {score}",
                       f"{100 * predicted:.1f}% if codes are coordinates",
                       f"{sweep.spread(ours, 100)}; n={len(ours)}", "holds" if off.max() <= 0.05
                       else "in part" if abs(np.mean(ours) - predicted) <= 0.05 else "no")
    yield ("rank correlation of FactorVAE score and share too near", "positive", *rank([
        (r["factor_vae"], r["misplaced"]) for r in rows if r["misplaced"] is not None]))


def claims(rows):
    """Each measure of all arms, and each question; ModelCentrality; on `free` the prediction."""
    found, known = [], [(r["centrality"], r["factor_vae"]) for r in rows if "centrality" in r]
    for key, (words, unit) in MEASURES.items():
        of = by_arm(rows, key)
        ours = {arm: sweep.spread(v, unit) for arm, v in of.items()}
        found.append((f"{words} of {', '.join(of)}", "infogan-cr is best", ", ".join(ours.values(
            )) + f"; n={len(of[rows[0]['arm']])}", sweep.beside(of, "infogan-cr", True)))
        found += [(f"{words} of {a}, {b}", answer, f"{ours[a]}, {ours[b]}", sweep.verdict(
            of[a], of[b])) for answer, (a, b) in QUESTIONS.items() if {a, b, "untrained"} <= {*of}]
    if known:
        picked, mean = max(known)[1], np.mean([true for _, true in known])
        found += [("rank correlation of ModelCentrality and FactorVAE score", "positive",
                   *rank(known)), ("FactorVAE score of the model picked by ModelCentrality, and "
                  "mean of all", "better than the mean", f"{picked:.3g}, {mean:.3g}; "
                  f"n={len(known)}", "holds" if picked > mean else "no")]
    found += claims_free(rows) if rows[0]["dataset"] == "free" else []
    return [{"paper": "InfoGAN-CR", "what": f"{rows[0]['dataset']}: {what}", "theirs": theirs,
             "ours": ours, "verdict": verdict, "front": False}
            for what, theirs, ours, verdict in found]


def plot(folder):
    """figure.png from the files: in a row of images a code moves; of scores a dot is a seed."""
    rows = (result := sweep.read_result(folder, Path(__file__).stem))["rows"]
    arms, fig = by_arm(rows, "seed"), harness.figure(3.4)
    colours = {arm: f"C{[*ARMS].index(arm)}" for arm in arms} | {"untrained": "grey"}
    top, low = fig.subfigures(2, 1, height_ratios=[1, 2])
    for ax, (arm, seeds) in zip(top.subplots(1, len(arms), squeeze=False)[0], arms.items()):
        x = np.load(folder / f"{arm}-s{seeds[0]}" / "samples.npz")["samples"]
        ax.imshow(harness.grid(x, len(x) // rows[0]["codes"]), interpolation="nearest")
        ax.set(title=arm, xlabel="a code, -1 to 1", xticks=[], yticks=[], frame_on=False)
    *axes, last = low.subplots(1, len(MEASURES) + 1)
    for ax, (key, (words, _)) in zip(axes, MEASURES.items()):
        for arm, numbers in by_arm(rows, key).items():
            ax.scatter(numbers, [[*colours].index(arm)] * len(numbers), 12, colours[arm])
        ax.set(title=words, ylim=(len(colours) - 0.5, -0.5))
        ax.set_yticks(range(len(colours)), colours if ax is axes[0] else [""] * len(colours))
    for r in rows:
        last.scatter(r.get("centrality", np.nan), r["factor_vae"], 12, colours[r["arm"]])
    last.set(xlabel="ModelCentrality", title="FactorVAE score")
    harness.save_figure(fig, folder)
    return result


def configure(args):
    """A configuration for each run; what an arm is about overrides the flags."""
    args.arms, args.seeds = args.arms or list(ARMS), args.seeds or [0]
    presets = neighbours.PRESETS[args.dataset]
    cfg = sweep.resolve(args, OWN, COMMON, presets["paper"], presets[args.preset],
                        LENGTH.get(args.preset, {}), channels=1)
    if cfg.codes > cfg.z_dim:
        raise core.UserError(f"--codes {cfg.codes}: more than --z-dim {cfg.z_dim} latents")
    return [Namespace(**vars(cfg) | ARMS[arm], arm=arm, seed=seed, run=f"{arm}-s{seed}")
            for seed in cfg.seeds for arm in cfg.arms]


def main(argv=None):
    p = sweep.parser(__doc__, neighbours.PRESETS["ring"], OWN, ARMS)
    p.set_defaults(dataset="halves", data_dir=data.DATA_DIR)
    args = sweep.parse(p, __file__, argv)
    if args.plot:
        return plot(args.plot)
    if args.sample:
        return harness.sample(args, prior=uniform)
    runs = configure(args)
    if sweep.announce(runs, args.dry_run, run):
        return {}
    if not sweep.worker():      # what is wrong shows here, before any file
        core.check_batch(runs[0], len(neighbours.training(runs[0])))
    folder, rows = sweep.train_all(args, f"{args.dataset}-{args.preset}", runs, run)
    if len(runs) > 1:
        add_centrality(rows, runs, folder)
    sweep.write_result(args, folder, runs, rows, claims(rows))
    return plot(folder)


if __name__ == "__main__":
    harness.cli(main)
