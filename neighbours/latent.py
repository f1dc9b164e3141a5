"""Are wrong counts the price of the latents' law? AE-OT-GAN and pseudo-supervision, crossed.

AE-OT-GAN (An et al. 2020) draws latents from a law that is carried to the codes of an autoencoder,
and tells G which code belongs to which image. Pseudo-supervised GANs (Luzi, Dar, Baraniuk 2021)
keep the Gaussian and tell G pairs of fixed noise and images. Each differs from a plain GAN in two
things only: the law, and the pairs. So cross them, to see which of the two does the work.

    python -m neighbours.latent --dataset free --seeds 0 1 2
    python -m neighbours.latent --dataset halves --law ot --pairs encoded

Arms, LAW-PAIRS. Laws: gaussian; uniform; encoded, the codes of training images as they are; ot,
mixtures of two codes whose cells touch under optimal transport; knn, of two near codes, the control
that ot has to beat; gmm, Gaussians fitted to the codes. Pairs: none; random, a normal draw for each
image; encoded, its code; rematched, that of another image, drawn anew at each update. Data: a
random half of all images of a set (free, halves, apart, disc, torus), the rectangles of exp_sc.py
(geometry), or CIFAR-10.
Presets: paper (one GPU), cpu (five arms: ten minutes a seed on a core), smoke (seconds).
"""
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from torch import nn

import core
import data
import harness
import neighbours
import sweep

# DEVIATION: G starts from scratch, as in every other arm; that of AE-OT-GAN starts as the decoder.
# There is one loss of pairs, of pixels, and none of D's features, whose weight was not to be found.
# UNSPECIFIED: the weight of pairs. 1 at first, 0 from the middle of the run.
COMMON = neighbours.COMMON | dict(n_codes=5000, ae_steps=1500, ot_steps=200, quantile=0.5,
                                  pair_weight=1.0, pair_until=0.5)
FEW = dict(n_codes=32, ae_steps=4, ot_steps=4)
PRESETS = {kind: presets | {"smoke": presets["smoke"] | FEW} for kind, presets in (
    (k, neighbours.PRESETS[k]) for k in (*neighbours.SETS, "geometry", "cifar10"))}
PRESETS["cifar10"]["cpu"] = PRESETS["cifar10"]["cpu"] | dict(n_codes=1000, ae_steps=300)
LAWS = ("gaussian", "uniform", "encoded", "ot", "knn", "gmm")
OF_CODES = LAWS[2:]
PAIRS = ("none", "random", "encoded", "rematched")
ARMS = {f"{law}-{pairs}": (law, pairs) for law in LAWS for pairs in PAIRS}
COLOURS, DASHES = dict(zip(LAWS, ("k", "C7", "C1", "C0", "C2", "C4"))), dict(
    zip(PAIRS, ("-", ":", "--", "-.")))
MAIN = ("gaussian-none", "gaussian-random", "ot-encoded", "knn-encoded", "encoded-none")
OWN = {
    "law": (LAWS, "the arms with this law, instead of --arms"),
    "pairs": (PAIRS, "the arms with these pairs, instead of --arms"), **neighbours.OWN,
    "dataset": (tuple(PRESETS), "(%(default)s)"),
    "n_codes": (int, 2, 10 ** 5, "training images at most that are encoded and paired"),
    "ae_steps": (int, 1, 10 ** 9, "updates of the autoencoder"),
    "ot_steps": (int, 1, 10 ** 9, "updates of the heights of optimal transport"),
    "quantile": (float, 0, 1, "share of the mixtures that is kept, those of the smallest angles"),
    "pair_weight": (float, 0, 10 ** 6, "weight of the pairs' loss at first"),
    "pair_until": (float, 0.000001, 10 ** 9, "share of the run in which it falls to 0")}
CELLS = 2 ** 20     # entries of a matrix of points and codes


# ----------------------------------------------------------------------------- codes and their laws


def autoencode(cfg, x, size, device):
    """Codes (n, Z) of images x uint8 (n, C, H, W) by an autoencoder of the GAN's own networks, each
    of Z = `size` coordinates of mean 0 and variance 1, and its mean squared error."""
    G, (*layers, last, _) = core.build(Namespace(**vars(cfg) | {"z_dim": size}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        encoder = nn.Sequential(*layers, nn.Linear(last.in_features, size)).to(device)
    x, decoder, gen = x.to(device), G.to(device), core.generator(cfg.seed, device)
    opt = core.adam([*encoder.parameters(), *decoder.parameters()], 1e-3, (0.9, 0.999))
    for step in range(cfg.ae_steps):
        opt.param_groups[0]["lr"] = 1e-3 * min(1, 2 - 2 * step / cfg.ae_steps)
        part = core.to_float(x[core.draw_index(len(x), min(64, len(x)), gen, device)])
        codes = encoder(part)
        loss = (decoder(codes) - part).square().mean() + 1e-5 * codes.abs().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    with torch.no_grad():
        codes = torch.cat([encoder(core.to_float(part)) for part in x.split(256)])
    std = codes.std(0, correction=0).clamp(min=1e-6)
    return ((codes - codes.mean(0)) / std).cpu(), loss.item()


def cells(u, y, h, k=1):
    """The k cells (s, k) that points u (s, Z) lie in or nearest to: the largest <u, y_i> + h_i."""
    parts = [torch.addmm(h, part, y.T) for part in u.split(max(1, CELLS // len(y)))]
    return torch.cat([v.argmax(1, keepdim=True) if k == 1 else v.topk(k, 1).indices for v in parts])


def transport(y, mass, steps, gen, points=10_000):
    """Heights (n,) of the semi-discrete optimal transport from the uniform law of the cube
    [-1/2, 1/2]^Z to codes y (n, Z) of masses (n,), which sum to 1; what is left, a dict.

    The cell of i, where <u, y_i> + h_i is largest, shall have the mass of i: Adam on h, whose
    gradient is a cell's share of fresh points less its mass. tv is the total variation of 64 n
    fresh points from the masses, tv_floor its mean for points that are drawn by the masses.
    """
    h = -y.square().sum(1) / 2              # cells are those of the nearest code
    opt = core.adam([h], 1e-2 * y.std().item(), (0.9, 0.99))

    def shares(n):
        u = torch.rand(n, y.shape[1], generator=gen) - 0.5
        return cells(u, y, h)[:, 0].bincount(minlength=len(y)) / n
    lr = opt.param_groups[0]["lr"]
    for step in range(steps):
        opt.param_groups[0]["lr"] = lr * (1 - step / steps)
        h.grad = shares(points) - mass
        opt.step()
    n = 64 * len(y)
    last, ideal = shares(n), torch.multinomial(mass, n, True, generator=gen).bincount(
        minlength=len(y)) / n
    return h, {"tv": (last - mass).abs().sum().item() / 2, "empty": int((last == 0).sum()),
               "tv_floor": (ideal - mass).abs().sum().item() / 2}


def mixtures(i, j, y, quantile):
    """Three quarters of code i and one of code j, (s,) each -> (kept, Z): of these the share
    `quantile` with the smallest angles between (y_i, -1) and (y_j, -1)."""
    # DEVIATION: the threshold is a quantile, as an angle depends on the codes' scale. UNSPECIFIED:
    # the weights. Those of the authors' AE-OT code, the larger one on the cell that was drawn.
    normal = nn.functional.normalize(nn.functional.pad(y, (0, 1), value=-1))
    angle = (normal[i] * normal[j]).sum(1).clamp(-1, 1).acos()
    kept = angle <= torch.quantile(angle[:2 ** 20], quantile)
    return 0.75 * y[i[kept]] + 0.25 * y[j[kept]]


def draw_law(cfg, law, y, mass, n):
    """n latents (n, Z) of a law around codes y (m, Z) of masses (m,), and what it took, a dict."""
    gen, more = core.generator(cfg.seed), {}
    i = torch.multinomial(mass, 2 * n, True, generator=gen)
    if law == "encoded":
        return y[i[:n]], more
    # UNSPECIFIED: how the mixture is fitted. 16 Gaussians, of the clusters of k-means.
    if law == "gmm":
        _, label = kmeans2(y.numpy(), min(16, len(y)), seed=cfg.seed, minit="++")
        label = torch.from_numpy(label)[i[:n]]
        z = torch.empty(n, y.shape[1])
        for k in label.unique():
            mine = y[i[:n]][label == k]
            spread = torch.linalg.cholesky(torch.cov(mine.T, correction=0) + 1e-4 * torch.eye(
                y.shape[1]))
            z[label == k] = mine.mean(0) + torch.randn(mine.shape, generator=gen) @ spread.T
        return z, more
    if law == "ot":
        scaled = y / (2 * y.abs().max())
        h, more = transport(scaled, mass, cfg.ot_steps, gen)
        u = torch.rand(2 * n, y.shape[1], generator=gen) - 0.5
        i, j = cells(u, scaled, h, 2).T
    # UNSPECIFIED: how near a neighbour is. One of the 10 nearest codes.
    else:
        near = torch.cat([torch.cdist(part, y).topk(min(11, len(y)), largest=False).indices[:, 1:]
                          for part in y.split(max(1, CELLS // len(y)))])
        j = near[i, torch.randint(near.shape[1], i.shape, generator=gen)]
        scaled = y / (2 * y.abs().max())
    z = mixtures(i, j, scaled, cfg.quantile) * (2 * y.abs().max())
    return z[torch.randint(len(z), (n,), generator=gen)], more


class Uniform(nn.Module):
    """Normals z (B, Z) -> uniform numbers of variance 1."""

    def forward(self, z):
        return 3 ** 0.5 * torch.erf(z / 2 ** 0.5)


def code_size(cfg):
    """Z, the size of G's latents: of z_dim normals the first picks a row, if the law has rows."""
    return cfg.z_dim - (ARMS[cfg.arm][0] in OF_CODES)


def networks(cfg):
    """G, which begins with its law, a bank of latents still to be filled in, and D."""
    z, law = code_size(cfg), ARMS[cfg.arm][0]
    G, D = core.build(Namespace(**vars(cfg) | {"z_dim": z}))
    bank = 2 ** 20 // z if law in OF_CODES else 0
    return nn.Sequential(Uniform() if law == "uniform" else neighbours.Prior(bank, z, 0), G), D


# ---------------------------------------------------------------------------------------- training


def g_loss(t):
    """G's loss of eq. (1) and, in arms with pairs, the weighted mean squared difference of what G
    makes of a batch of codes and their images."""
    loss, logs = core.g_loss(t)
    if t.codes is None:
        return loss, logs
    i = j = core.draw_index(len(t.codes), min(t.cfg.batch, len(t.codes)), t.gen, t.device)
    if ARMS[t.cfg.arm][1] == "rematched":
        j = core.draw_index(len(t.codes), len(i), t.gen, t.device)
    off = (t.G[1](t.codes[j]) - t.images(i, t.paired)).square().mean()
    left = max(0, 1 - t.step / (t.cfg.pair_until * t.cfg.steps))
    return loss + t.cfg.pair_weight * left * off, {"pairs": off}


def prepare_codes(cfg, x, folder, device):
    """Different images (n, C, H, W) of the data x, and what their arm needs of them: latents
    `codes` (n, Z) or None, rows `bank` (m, Z) of its law, `took`, what it cost. Saved in the run's
    folder, so that a resumed run goes on with the same ones."""
    (law, pairs), size, path = ARMS[cfg.arm], code_size(cfg), folder / "prepared.pt"
    gen, dry, found = core.generator(cfg.seed), getattr(cfg, "dry", False), {"codes": None}
    x, counts = torch.unique(x, dim=0, return_counts=True)
    index = torch.randperm(len(x), generator=gen)[:cfg.n_codes]
    x, mass, rows = x[index], counts[index] / counts[index].sum(), 2 ** 20 // size
    if path.exists() and not dry:
        return x, torch.load(path, weights_only=True)
    found |= {"bank": torch.zeros(rows * (law in OF_CODES), size), "took": {}}
    y, start = torch.randn(len(x), size, generator=gen), time.process_time()
    if not dry and (law in OF_CODES or pairs in ("encoded", "rematched")):
        y, found["took"]["mse"] = autoencode(cfg, x, size, device)
    if pairs != "none":
        found["codes"] = torch.randn(y.shape, generator=gen) if pairs == "random" else y
    if not dry:
        if law in OF_CODES:
            found["bank"], more = draw_law(cfg, law, y, mass, rows)
            found["took"] |= more
        found["took"]["seconds"] = time.process_time() - start
        with harness.atomic(path) as tmp:
            torch.save(found, tmp)
    return x, found


def make_trainer(cfg, x, folder):
    """A core.Trainer with its law in G, and pairs of latents and images to tell G -> it, took."""
    device, (G, D) = harness.pick_device(cfg.device), networks(cfg)
    paired, found = prepare_codes(cfg, x, folder, device)
    if len(found["bank"]):
        G[0].e[...] = found["bank"]
    t = core.Trainer(cfg, x.to(device), G, D, g_loss=g_loss)
    t.paired, t.codes = paired.to(device), found["codes"]
    if t.codes is not None:
        t.codes = t.codes.to(device)
    return t, found["took"]


def run(cfg, folder):
    """Train one arm with one seed, from scratch or from its checkpoint, and score it -> its row."""
    x, score, protocol = neighbours.prepare(cfg)
    t, took = make_trainer(cfg, x, folder)
    ended = neighbours.fit(t, folder, score, protocol)
    with harness.atomic(folder / "samples.npz") as tmp:
        np.savez(tmp, samples=t.preview(36).cpu())
    return {"dataset": cfg.dataset, "arm": cfg.arm, "seed": cfg.seed, "steps": t.step, **protocol,
            "n_codes": len(t.paired), **took, **score(torch.cat(list(t.fakes(cfg.n_end)[""]))),
            **ended, "update_seconds": harness.update_seconds(t)}


# ----------------------------------------------------------------------------------------- results


QUESTIONS = {   # what it says if the first of two arms is better
    "the law cures": ("encoded-none", "gaussian-none"),
    "the pairs cure": ("gaussian-random", "gaussian-none"),
    "both cure, as AE-OT-GAN has them": ("ot-encoded", "gaussian-none"),
    "transport does more than neighbours": ("ot-encoded", "knn-encoded"),
    "the law does more than pairs": ("encoded-none", "gaussian-random"),
    "its law alone cures": ("ot-none", "gaussian-none"),
    "its pairs alone cure": ("gaussian-encoded", "gaussian-none"),
    "both do more than its law": ("ot-encoded", "ot-none"),
    "both do more than its pairs": ("ot-encoded", "gaussian-encoded"),
    "mixtures do more than codes": ("ot-encoded", "encoded-encoded")}


COSTS = {"the pairs cost copies": ("gaussian-random", "gaussian-none"),
         "AE-OT-GAN costs copies": ("ot-encoded", "gaussian-none")}


def claims(rows):
    """Each measure of all arms, and questions by the main one, by copies, and, as to speed, by what
    the main one was at half of the run; updates to 60% exact."""
    one, found, arms = rows[0], [], list(dict.fromkeys(r["arm"] for r in rows))
    main, *_ = measures = neighbours.MEASURES[one["dataset"]]
    for key in (*measures, "half"):
        words, unit = measures.get(key, measures[main])
        ends = {arm: [r["curve"][(len(r["curve"]) - 1) // 2][1] if key == "half" else r[key]
                      for r in rows if r["arm"] == arm] for arm in arms}
        if any(None in v for v in ends.values()) or key == "half" and len(one["curve"]) < 2:
            continue
        words = words.format(**one) + ", at half of the run," * (key == "half")
        ours = {a: sweep.spread(v, unit) for a, v in ends.items()}
        asked = {main: QUESTIONS, "copies": COSTS, "half": {"the pairs help speed": QUESTIONS[
            "the pairs cure"]}}.get(key, {})
        found.append((f"{words} of {', '.join(arms)}", "", f"{', '.join(ours.values())}; "
                      f"n={len(ends[arms[0]])}", ""))
        found += [(f"{words} of {a}, {b}", answer, f"{ours[a]}, {ours[b]}",
                   sweep.verdict(ends[a], ends[b], key == "copies" or key not in neighbours.LOWER))
                  for answer, (a, b) in asked.items() if {a, b} <= set(arms)]
    if main == "correct_exact":
        first = {arm: [next((f"{step:,}" for step, share in r["curve"] if share >= 0.6), "never")
                       for r in rows if r["arm"] == arm] for arm in arms}
        found.append((f"updates to 60% exactly correct of {', '.join(arms)}", "", "; ".join(
            ", ".join(v) for v in first.values()), ""))
    return [{"paper": "AE-OT-GAN", "what": f"{one['dataset']}: {what}", "theirs": theirs,
             "ours": ours, "verdict": verdict, "front": False}
            for what, theirs, ours, verdict in found]


def plot(folder):
    """figure.png from the files: what each arm draws, its score, and what it copies."""
    rows = (result := sweep.read_result(folder, Path(__file__).stem))["rows"]
    kind, size = rows[0]["dataset"], result["config"]["size"]
    arms = {r["arm"]: [q for q in rows if q["arm"] == r["arm"]] for r in rows}
    fig, n = harness.figure(4.2), len(arms)
    axes = fig.subplot_mosaic([[arm for arm in arms for _ in "12"], ["score"] * n + ["last"] * n],
                              height_ratios=[1, 1.5])
    (main, (words, _)), *_, (last, (other, _)) = neighbours.MEASURES[kind].items()
    for arm, mine in arms.items():
        with np.load(folder / f"{arm}-s{mine[0]['seed']}" / "samples.npz") as saved:
            x = torch.from_numpy(saved["samples"])
        if good := neighbours.right(kind, size):
            x = harness.frame(x, harness.red(good(x)))
        law, pairs = ARMS[arm]
        colour, dash = COLOURS[law], DASHES[pairs]
        neighbours.show(axes[arm], x, kind, f"{law}\n{pairs}", None)
        harness.band(axes["score"], [[*zip(*r["curve"])] for r in mine], arm, color=colour, ls=dash,
                     marker=".")
        axes["last"].plot(
            [r[main] for r in mine], [r[last] for r in mine], ls="", ms=4, color=colour, marker={
                "random": "x", "rematched": "+"}.get(pairs, "o"), mfc="none" if pairs == "none" else
            colour)
    axes["score"].set(xlabel="updates of G", title=words.format(**rows[0]))
    axes["last"].set(xlabel=words.format(**rows[0]), title=other)
    axes["score"].legend()
    red = "Red frame: not an image of the set. " * (kind != "cifar10")
    fig.suptitle(f"{kind}. {red}Right, a mark a seed: full, pairs of codes; open, no pairs; cross, "
                 "pairs of noise")
    harness.save_figure(fig, folder)
    return result


def configure(args):
    """A configuration for each run; a law of codes takes a normal more, to pick one of its rows."""
    if args.law or args.pairs:
        args.arms = [arm for arm, (law, pairs) in ARMS.items() if args.law in (None, law)
                     and args.pairs in (None, pairs)]
    args.arms, args.seeds = args.arms or list(MAIN), args.seeds or [0]
    presets = PRESETS[args.dataset]
    cfg = sweep.resolve(args, OWN, COMMON, presets["paper"], presets[args.preset],
                        channels=3 if args.dataset == "cifar10" else 1)
    return [Namespace(**vars(cfg) | {"z_dim": cfg.z_dim + (ARMS[arm][0] in OF_CODES)}, arm=arm,
                      seed=seed, run=f"{arm}-s{seed}") for seed in cfg.seeds for arm in cfg.arms]


def main(argv=None):
    p = sweep.parser(__doc__, PRESETS["free"], OWN, ARMS)
    p.set_defaults(dataset="free", data_dir=data.DATA_DIR)
    args = sweep.parse(p, __file__, argv)
    if args.plot:
        return plot(args.plot)
    if args.sample:
        return harness.sample(args, networks)
    runs = configure(args)
    if sweep.announce(runs, args.dry_run, run):
        return {}
    if not sweep.worker():      # what is missing or wrong shows here, before any file
        core.check_batch(runs[0], len(neighbours.prepare(runs[0])[0]))
    folder, rows = sweep.train_all(args, f"{args.dataset}-{args.preset}", runs, run)
    sweep.write_result(args, folder, runs, rows, claims(rows))
    return plot(folder)


if __name__ == "__main__":
    harness.cli(main)
