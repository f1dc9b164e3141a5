"""Figures 3 and 4: D takes pixel-wise combinations of training images for real, and G draws them.

On rectangles (Section 4.2): trained on two images of three rectangles, which share two, a GAN also
draws their AND and OR, and early on D scores them like reals; PCR makes both extra negatives. On
photographs (Section 4.3): some fakes are averages of two training images, and averages of similar
ones ("GAM") are as good as fakes, because D is smooth where images are near (Theorem 3).

    python exp_pixel_combination.py [--dataset celeba]

Controls: other rectangles and random pixels; the pair search for held-out and training photographs;
images as far from a photograph as its average is; the distance of held-out photographs and of
averages of random pairs. Averages are many and smooth, so held-out photographs are near them too.
Presets: paper, cpu (rectangles in five minutes on two cores, photographs in ten), smoke. Expected
with cpu: 15% of vanilla's samples are AND or OR, with PCR none; nearly all photographs, generated
or not, are nearer to an average than to an image.
"""
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch

import core
import data
import fid
import geometry
import harness
import sweep

COMMON = dict(
    arch="dcgan", norm_d="none", batch=64, lr_g=2e-4, lr_d=2e-4, beta1=0.5, beta2=0.9, z_dim=128,
    width=64, base=4, comb_weight=0.5, gp_comb=False, flip=False, lr_decay=False, ema_beta=0.0)
# UNSPECIFIED: the rectangles' GAN, but for its two images and about 600 steps (Section 4.2). The
# loss is the non-saturating one of eq. (1)'s example, f1 = log x, f2 = log(1 - x).
PRESETS = {
    "paper": dict(size=32, loss="ns", init_d="dcgan", gp_weight=0.0, n_dis=1, steps=600,
                  n_fid=1024, checks=60, log_every=10, seeds=[0, 1, 2, 3, 4]),
    # DEVIATION: rectangles on a CPU. Canvas and squares are half as wide, with half the channels.
    "cpu": dict(size=16, width=32, n_fid=512, seeds=[0, 1, 2]),
    "smoke": dict(jobs=1, size=16, width=8, z_dim=16, batch=16, steps=4, n_fid=32, checks=2,
                  log_every=2)}
# UNSPECIFIED: the GAN of Figures 3 (bottom) and 4. WGAN-GP as in exp_pcr_natural.py, whose critic
# is meant to be Lipschitz, as Theorem 3 has it.
# UNSPECIFIED: how many photographs it sees. 10,000, so that all their 5e7 pairs can be searched.
PHOTOS = {
    "paper": dict(loss="wgan", init_d="he", gp_weight=10.0, n_dis=5, d_steps=50_000, n_query=1000,
                  n_train=10_000, n_view=1000, n_fid=5000, dims=2048, checks=20, log_every=100),
    # DEVIATION: photographs on a CPU. Half the width or less, few and larger steps, the distance
    # of early features, which has full rank with few images. Small batches, because two cores draw
    # faces after as many images as large ones need for blots.
    "cpu": dict(steps=2400, batch=8, width=32, n_dis=1, lr_g=5e-4, lr_d=5e-4, n_query=200,
                n_view=200, n_fid=256, n_real=1000, dims=192, checks=10, log_every=20),
    "smoke": dict(jobs=1, steps=4, n_dis=1, batch=8, width=8, z_dim=16, n_query=4, n_view=8,
                  n_fid=8, n_real=32, checks=2, log_every=2)}
OF_PHOTOS = {
    "n_search": (int, 3, 10 ** 9, "training images to search the pairs of; default all"),
    "n_query": (int, 2, 10 ** 9, "images of each kind to search a pair for"),
    "n_view": (int, 2, 10 ** 9, "images of each kind that D is shown"),
    **{k: (data.FLAGS | fid.FLAGS)[k] for k in ("n_train", "n_real", "dims", "fid_weights")}}
OWN = {"dataset": (str, "geometry (rectangles), cifar10, celeba, imagenet, or a folder or zip of "
                        "images (%(default)s)"), "data_dir": data.FLAGS["data_dir"], **OF_PHOTOS}


def pcr_squares(t, x_real, x_fake):
    """Eq. (13): half of the negative weight goes to the AND and the OR, drawn from t.pool."""
    index = torch.randint(len(t.pool), (t.cfg.batch,), generator=t.gen, device=t.device)
    return core.d_loss(t, x_real, x_fake, x_comb=t.images(index, t.pool))


# An arm is d_loss(t, x_real, x_fake) -> (loss, {name: tensor}).
ARMS = {"vanilla": core.d_loss, "pcr": pcr_squares}
PHOTO_ARMS = {"vanilla": core.d_loss, "pcr": lambda t, x_real, x_fake: core.d_loss(
    t, x_real, x_fake, x_comb=core.pixel_average(x_real))}
# What D is shown: label, colour, dash; told apart in greyscale too.
SHOWN = {"real": ("A or B (three)", "#009E73", "-"), "and": ("A AND B (two)", "#D55E00", "--"),
         "or": ("A OR B (four)", "#0072B2", "-."), "three": ("three elsewhere", "#000000", ":"),
         "random": ("random pixels", "#CC79A7", (0, (1, 3)))}
PHOTOS_SHOWN = {
    "real": ("training", "#009E73", "-"), "heldout": ("held-out", "#56B4E9", (0, (5, 1))),
    "average": ("average", "#D55E00", "--"), "permuted": ("permuted", "#0072B2", "-."),
    "random": ("random", "#CC79A7", (0, (1, 3))), "fake": ("generated", "#000000", ":")}


@torch.no_grad()
def look(D, shown):
    """D's scores in eval mode: {kind: images (N, C, H, W)} -> {kind: (N,)}."""
    D.eval()
    scores = {k: torch.cat([D(b) for b in x.split(256)]) for k, x in shown.items()}
    D.train()
    return scores


# ------------------------------------------------------------------------------------- rectangles


def images_of(cfg):
    """A, B, their AND and their OR: uint8 (4, 1, H, W), of three, three, two and four squares."""
    return torch.cat(geometry.draw_pairs(1, cfg.size, cfg.size // 4, k=3, seed=cfg.seed))


def shown_of(cfg, known):
    """What D is shown, float (N, 1, H, W): `images_of`, three squares elsewhere, random pixels."""
    density = (known[:2] > 127).float().mean()
    noise = torch.rand(64, 1, cfg.size, cfg.size, generator=core.generator(cfg.seed)) < density
    three = geometry.draw(64, 3, cfg.size, cfg.size // 4, seed=cfg.seed + 1)
    shown = dict(zip(("a", "b", "and", "or"), known.split(1)), three=three, random=noise * 255)
    return {k: core.to_float(v).to(harness.pick_device(cfg.device)) for k, v in shown.items()}


def score(t):
    """Shares of n_fid samples, of so many squares or equal to an image, and D's mean scores."""
    x = torch.cat(list(t.fakes(t.cfg.n_fid)[""]))
    n, _ = geometry.count(x, t.cfg.size // 4)
    found = {k: n == k for k in (2, 3, 4)} | {
        k: geometry.is_in(x, t.shown[k]) for k in ("a", "b", "and", "or")}
    return {**{f"share_{k}": v.float().mean().item() for k, v in found.items()},
            **{f"d_{k}": v.mean().item() for k, v in look(t.D, t.shown).items()}}


def run_squares(cfg, folder):
    """Train one arm with one seed, from scratch or from its checkpoint -> a row for each score."""
    known, device = images_of(cfg), harness.pick_device(cfg.device)
    # UNSPECIFIED: how batches come from two images. Drawn from 64 copies of each, so that a batch
    # of 64 holds both in changing numbers.
    t = core.Trainer(cfg, known[:2].repeat(64, 1, 1, 1).to(device), *core.build(cfg),
                     d_loss=ARMS[cfg.arm])
    t.pool, t.shown = known[2:].to(device), shown_of(cfg, known)
    harness.fit(t, folder, score)
    with harness.atomic(folder / "samples.npz") as tmp:
        np.savez(tmp, samples=t.preview(48).cpu(), known=known)
    return [{"arm": cfg.arm, "seed": cfg.seed, **r, "share_real": r["share_a"] + r["share_b"],
             "d_real": (r["d_a"] + r["d_b"]) / 2, "n": cfg.n_fid}
            for r in harness.read_rows(folder / "metrics.jsonl") if "share_a" in r]


# --------------------------------------------------------------------------- photographs: search


def flat(x):
    """Images (N, ...) as rows of float32 (N, F), uint8 ones in [-1, 1]."""
    return (core.to_float(x) if x.dtype == torch.uint8 else x.float()).flatten(1)


def distance(queries, *members, block=512):
    """L2 distance (Q,) of each query to the average of its members, directly, in float64."""
    return torch.cat([(flat(q).double() - sum(flat(m).double() for m in ms) / len(ms)).norm(dim=1)
                      for q, *ms in zip(*(x.split(block) for x in (queries, *members)))])


def nearest_image(queries, images, own=None, block=512):
    """The image nearest to each query in L2, over all images -> index (Q,), distance (Q,) float64.

    queries (Q, ...), images (N, ...), uint8 (in units of [-1, 1]) or float. own (Q,): the index of
    an image that a query is itself, and that is left out for it.
    """
    centre, index = flat(images).mean(0), []
    x = flat(images) - centre                                           # small numbers round less
    for i in range(0, len(queries), block):
        u = x.square().sum(1) - 2 * ((flat(queries[i:i + block]) - centre) @ x.T)
        if own is not None:
            u.scatter_(1, own[i:i + block, None], torch.inf)
        index.append(u.argmin(1))
    return torch.cat(index), distance(queries, images[torch.cat(index)])


def nearest_pair(queries, images, own=None, block=64, limit=None):
    """The two images whose average is nearest to each query, over all N (N - 1) / 2 pairs.

    |2 q - a - b|^2 = |2 q|^2 + u_a + u_b + 2 a.b with u_a = |a|^2 - 4 q.a: a smallest sum, searched
    by `block` rows of a Gram matrix that is never whole, about `limit` sums at a time. -> pairs
    (Q, 2), distances (Q,) float64. Arguments as of nearest_image; to the rounding of float32.
    """
    limit = limit or (2 ** 26 if images.is_cuda else 2 ** 20)           # what a cache holds
    centre = flat(images).mean(0)
    x = flat(images) - centre
    u = x.square().sum(1) - 4 * ((flat(queries) - centre) @ x.T)        # (Q, N)
    if own is not None:
        u.scatter_(1, own[:, None], torch.inf)
    least, first = torch.full_like(u[:, 0], torch.inf), torch.zeros_like(u[:, 0]).long()
    for i in range(0, len(x), block):
        gram = 2 * x[i:i + block] @ x[i:].T                             # (rows, N - i)
        gram += torch.full_like(gram, torch.inf).tril()                 # each pair once
        for here in torch.arange(len(u), device=u.device).split(max(limit // gram.numel(), 1)):
            sums = (gram + u[here, None, i:]).amin(2) + u[here, i:i + block]
            value, row = sums.min(1)                                    # of (queries, rows)
            first[here] = torch.where(value < least[here], row + i, first[here])
            least[here] = torch.minimum(value, least[here])
    u += 2 * x[first] @ x.T                                             # given a, the best b
    second = u.scatter_(1, first[:, None], torch.inf).argmin(1)
    pairs = torch.stack([first, second], 1).sort(1).values
    return pairs, distance(queries, *images[pairs.T])


def average(a, b):
    """Average of uint8 images, rounded, as generated ones are."""
    return ((a.float() + b.float()) / 2).round().to(torch.uint8)


def search(queries, images, device, own=None, n_show=3):
    """How near queries are to averages and to images -> numbers, and arrays for the figure.

    nearer_average: share that is nearer to an average than to any image; l2: mean distance to the
    nearest average, ratio: in parts of that to the nearest image. Of use beside a control only.
    """
    queries, images = queries.to(device), images.to(device)
    image, d_image = nearest_image(queries, images, own)
    pair, d_pair = nearest_pair(queries, images, own)
    best = d_pair.argsort()[:n_show]    # as the paper does, those that suit the claim best
    a, b = images[pair[best].T]
    shown = torch.stack([queries[best], average(a, b), a, b, images[image[best]]], 1)
    kept = {"d_pair": d_pair, "d_image": d_image, "best": best, "shown": shown}
    return {"nearer_average": (d_pair < d_image).double().mean().item(), "l2": d_pair.mean().item(),
            "ratio": (d_pair.mean() / d_image.mean()).item()}, {k: v.cpu() for k, v in kept.items()}


def similar_pairs(images, n):
    """GAM's pairs: the first 2n images, each with its nearest other one, the first n different."""
    # UNSPECIFIED: which images are "structurally similar". Nearest neighbours, pixel by pixel.
    own = torch.arange(min(2 * n, len(images)), device=images.device)
    pairs = torch.stack([own, nearest_image(images[own], images, own)[0]], 1).sort(1).values
    return torch.tensor(list(dict.fromkeys(map(tuple, pairs.tolist())))[:n])


# ---------------------------------------------------------------------- photographs: what D takes


def same_distance(x, gen):
    """Three images as far from each x (B, C, H, W) as each other, not clipped (that would bring
    them nearer): its average with another one; a step in a random direction; the step to the
    average with its pixels permuted, colours kept together."""
    step, away = core.pixel_average(x) - x, torch.randn(x.shape, generator=gen)
    length = step.flatten(1).norm(dim=1) / away.flatten(1).norm(dim=1)
    place = torch.rand(len(x), 1, x[0, 0].numel(), generator=gen).argsort(2)
    moved = step.flatten(2).gather(2, place.expand(-1, x.shape[1], -1)).view_as(x)
    return core.pixel_average(x), x + away * length.view(-1, 1, 1, 1), x + moved


def premise(D, x, threshold, block=64):
    """Theorem 3's premise on f = D - threshold, for neighbours in x (N, C, H, W) -> numbers.

    premise_share: of all points (pair, lambda), lambda uniform, the share where eps > L delta
    min(lambda, 1 - lambda), with eps the least f on x (Assumption 2), 0 if that is not positive;
    premise_share_pair: with the lesser f of the pair, all that the proof needs. Both are upper
    bounds: `lipschitz` is the steepest slope found on these segments, and L is no less.
    segment_share: where f > 0. The premise is the same for the controls as far away.
    """
    lam, f, slopes = torch.linspace(0, 1, 11, device=x.device).view(-1, 1, 1, 1, 1), [], []
    for a, b in zip(x.split(block), x.roll(1, 0).split(block)):
        points = torch.lerp(a, b, lam).requires_grad_()                 # (11, B, C, H, W)
        d = D(points.flatten(0, 1)).view(11, -1)
        slopes.append(torch.autograd.grad(d.sum(), points)[0].flatten(2).norm(dim=2).max())
        f.append(d.detach() - threshold)
    f, delta = torch.cat(f, 1), (x - x.roll(1, 0)).flatten(1).norm(dim=1).clamp(min=1e-9)
    lipschitz = torch.stack([*slopes, (f.diff(dim=0).abs() * 10 / delta).max()]).max()
    least, widest = torch.minimum(f[0], f[-1]), lipschitz.clamp(min=1e-9) * delta / 2
    return {k: v.item() for k, v in {
        "premise_share": (least.min() / widest).clamp(0, 1).mean(), "margin": least.min(),
        "premise_share_pair": (least / widest).clamp(0, 1).mean(), "lipschitz": lipschitz,
        "segment_share": (f[1:-1] > 0).float().mean(), "delta": delta.mean()}.items()}


def prepare(cfg):
    """Training and held-out images, in random order, and gam_row(method, seed, images) -> row."""
    images, heldout = (x[torch.randperm(len(x), generator=core.generator(0))] for x in (
        data.load(cfg.dataset, cfg.size, cfg.data_dir, split) for split in ("train", "test")))
    images = images[:cfg.n_train]
    n, m = len(images), len(heldout)
    core.check_batch(cfg, n)
    for key, most in {"n_search": n, "n_real": n, "n_query": min(cfg.n_search or n, m),
                      "n_view": min(n, m), "n_fid": min(n // 2, m)}.items():
        if (vars(cfg)[key] or 0) > most:
            raise core.UserError(f"--{key.replace('_', '-')} {vars(cfg)[key]}: at most {most}, for "
                                 f"{cfg.dataset} has {n} training and {m} held-out images")
    net = fid.load_inception(dims=cfg.dims, weights=cfg.fid_weights, data_dir=cfg.data_dir,
                             device=harness.pick_device(cfg.device))
    reference = fid.reference(net, images[-(cfg.n_real or n):], cfg.data_dir / "cache")

    def gam_row(method, seed, x):
        return {"part": "gam", "method": method, "seed": seed, "n": len(x), "n_real":
                cfg.n_real or n, "metric": net.label, "features": net.id, "dims":
                len(reference[0].mean), **fid.score(net, *reference, x.split(fid.BATCH))}

    return images, heldout, gam_row


def run_photos(cfg, folder):
    """Train one arm with one seed -> two rows, of the pair search and D's view, and of the FID."""
    if cfg.arm == "controls":
        return controls(cfg, folder)
    images, heldout, gam_row = prepare(cfg)
    t = core.Trainer(cfg, images.to(harness.pick_device(cfg.device)), *core.build(cfg),
                     d_loss=PHOTO_ARMS[cfg.arm])
    real = core.to_float(images[:cfg.n_view])
    shown = dict(zip(("average", "random", "permuted"), same_distance(real, core.generator(0))),
                 real=real, heldout=core.to_float(heldout[:cfg.n_view]))
    shown = {k: v.to(t.device) for k, v in shown.items()}

    def view(t):
        fakes = torch.cat(list(t.fakes(cfg.n_view)[""]))
        return look(t.D, shown | {"fake": core.to_float(fakes)})

    harness.fit(t, folder, lambda t: {f"d_{k}": v.mean().item() for k, v in view(t).items()})
    seen, fakes = view(t), torch.cat([x.cpu() for x in t.fakes(max(cfg.n_fid, cfg.n_query))[""]])
    found, arrays = search(fakes[:cfg.n_query], images[:cfg.n_search], t.device)
    # UNSPECIFIED: above which score D takes an image for real, as the zero of a WGAN's critic
    # means nothing. Halfway between its means on training images and on fakes.
    threshold = (seen["real"].mean() + seen["fake"].mean()) / 2
    with harness.atomic(folder / "samples.npz") as tmp:
        np.savez(tmp, samples=fakes[:16], **arrays, **{f"d_{k}": v.cpu() for k, v in seen.items()})
    return [{"part": "combination", "dataset": Path(cfg.dataset).name, "arm": cfg.arm,
             "seed": cfg.seed, "d_steps": cfg.d_steps, "threshold": threshold,
             **{f"{k}_fake": v for k, v in found.items()},
             **{f"d_{k}": v.mean() for k, v in seen.items()},
             **premise(t.D.eval(), shown["real"], threshold),
             "above": {k: (v > threshold).float().mean() for k, v in seen.items()},
             "curve": [{k: r[k] for k in ("step", *(f"d_{v}" for v in PHOTOS_SHOWN))}
                       for r in harness.read_rows(folder / "metrics.jsonl") if "d_heldout" in r]},
            gam_row(cfg.arm, cfg.seed, fakes[:cfg.n_fid])]


def controls(cfg, folder):
    """What needs no GAN: the pair search for real images, GAM, and the sets beside it -> rows."""
    device, (images, heldout, gam_row) = harness.pick_device(cfg.device), prepare(cfg)
    harness.open_run(Namespace(cfg=cfg, data=images, step=0), folder, {})   # its config.json
    known, n = images[:cfg.n_search], cfg.n_fid
    row = {"part": "controls", "pairs_searched": len(known) * (len(known) - 1) // 2}
    for name, queries, own in (("heldout", heldout, None), ("train", known, torch.arange(
            cfg.n_query, device=device))):  # a training image is no member of its own pairs
        found, arrays = search(queries[:cfg.n_query], known, device, own)
        row |= {f"{k}_{name}": v for k, v in found.items()}
        with harness.atomic(folder / f"{name}.npz") as tmp:
            np.savez(tmp, **arrays)
    pairs = similar_pairs(images.to(device), n)
    sets = {"held-out": heldout[:n], "gam": average(*images[pairs.T]),
            "random pairs": average(images[:n], images[n:2 * n])}
    with harness.atomic(folder / "samples.npz") as tmp:
        np.savez(tmp, **{k: v[:16] for k, v in sets.items()})
    return [row, *(gam_row(k, None, v) for k, v in sets.items())]


# --------------------------------------------------------------------------- what comes of it


def claims(rows):
    """Figure 3, top, or Figures 3, bottom, and 4. They are about vanilla: without it, none."""
    first, arms = rows[0], list(dict.fromkeys(r["arm"] for r in rows if "arm" in r))
    names, n, found = ", ".join(arms), len({r.get("seed") for r in rows} - {None}), []

    def claim(paper, what, theirs, ours, verdict):
        found.append({"paper": paper, "what": what, "theirs": theirs, "ours": f"{ours}, n={n}",
                      "verdict": verdict, "front": first.get("dataset", "celeba") == "celeba"})

    if "vanilla" in arms and "part" in first:
        near = {a: sweep.values(rows, "nearer_average_fake", arm=a) for a in arms}
        sets = {k: sweep.values(rows, "distance", method=k) for k in (*arms, "gam", "held-out")}
        ratio = np.mean(sets["gam"]) / np.mean(sets["vanilla"])
        held = first["nearer_average_heldout"]
        claim("Figure 3, bottom", f"{first['dataset']}: images nearer to an average of two "
              f"training images than to any: {names}, held-out", "generated ones are averages",
              ", ".join(sweep.spread(v, 100) for v in (*near.values(), [held])),
              "no: photographs are, too" if held > 0.5 else
              "holds" if np.mean(near["vanilla"]) > 0.5 else "no")
        # UNSPECIFIED: what "comparable" is. Within a factor of two, for a GAN of full length.
        claim("Figure 4", f"{first['dataset']}: {rows[-1]['metric']} of {names}, averages of "
              "neighbours (GAM), held-out", "GAM and GAN comparable",
              ", ".join(map(sweep.spread, sets.values())), "not decided: the GAN is small"
              if first["d_steps"] < PHOTOS["paper"]["d_steps"] else
              "holds" if 0.5 < ratio < 2 else "no")
    elif "vanilla" in arms:
        steps = sorted({r["step"] for r in rows})
        halfway = steps[(len(steps) - 1) // 2]
        both = {a: np.add(*(sweep.values(rows, k, arm=a, step=steps[-1])
                            for k in ("share_and", "share_or"))) for a in arms}
        logits = {a: [np.mean(sweep.values(rows, f"d_{k}", arm=a, step=halfway))
                      for k in ("real", "and", "or", "three")] for a in arms}
        share, (real, d_and, d_or, three) = both["vanilla"], logits["vanilla"]
        claim("Figure 3, top", f"samples that are the AND or OR of two images: {names}",
              "they prevail in vanilla", ", ".join(sweep.spread(v, 100) for v in both.values()),
              "holds" if min(share) > 0.5 else "in part" if max(share) > 0.1 else "no")
        claim("Figure 3, top", f"D at step {halfway} on reals, AND, OR, three squares elsewhere: "
              f"{names}", "reals = AND = OR, early, in vanilla",
              "; ".join(", ".join(f"{v:.1f}" for v in d) for d in logits.values()),
              "holds" if min(d_and, d_or) > (real + three) / 2 else "no")
    return found


def by_arm(rows):
    """{arm: its rows}, in the order of the rows."""
    return {a: [r for r in rows if r["arm"] == a] for a in dict.fromkeys(r["arm"] for r in rows)}


def draw_curves(ax, kinds, curves, value):
    """For each kind, value(point, kind) over the steps of the curves, each the points of a seed."""
    for kind, (label, colour, dash) in kinds.items():
        harness.band(ax, [([p["step"] for p in c], [value(p, kind) for p in c]) for c in curves],
                     label, color=colour, ls=dash, lw=1.6)


def plot_squares(rows, cfg, folder):
    """By arm: shares of samples, D's scores, the four images and samples -> figure."""
    arms = by_arm(rows)
    fig = harness.figure(2.4 * len(arms))
    axes = fig.subplots(len(arms), 3, squeeze=False)
    for (arm, here), (left, middle, right) in zip(arms.items(), axes):
        seeds = list(dict.fromkeys(r["seed"] for r in here))
        curves = [[r for r in here if r["seed"] == seed] for seed in seeds]
        draw_curves(left, {k: SHOWN[k] for k in ("real", "and", "or")}, curves,
                    lambda p, kind: p[f"share_{kind}"])
        draw_curves(middle, SHOWN, curves, lambda p, kind: p[f"d_{kind}"])
        left.set(title=f"{arm}: what the samples are (n={len(seeds)} seeds)", ylim=(0, 1),
                 xlabel="updates of G", ylabel="share of samples, exact to the pixel")
        middle.set(title=f"{arm}: how D scores them", xlabel="updates of G", ylabel="logit of D")
        left.legend()
        middle.legend()
        lines = []
        for seed in seeds:
            known = x = images_of(Namespace(size=cfg["size"], seed=seed))
            file = folder / f"{arm}-s{seed}" / "samples.npz"
            if file.exists():                           # else result.json came alone
                x = torch.cat([known, torch.as_tensor(np.load(file)["samples"])])[:9]
            frames = torch.full((len(x), 3), 200)
            for image, kind in zip(known.split(1), ("real", "real", "and", "or")):
                colour = bytes.fromhex(SHOWN[kind][1][1:])
                frames[geometry.is_in(x, image)] = torch.tensor([*colour])
            lines.append(harness.frame(x, frames))
        right.imshow(harness.grid(torch.cat(lines), len(lines[0])), interpolation="nearest")
        right.set_title("A, B, AND, OR, samples framed if\nequal to one of them; a line a seed")
        right.axis("off")
    return fig


def boxes(ax, groups):
    """Box plots of (label, values, colour) from the top down, with whiskers from 5 to 95%."""
    labels, values, colours = zip(*groups[::-1])
    drawn = ax.boxplot(values, tick_labels=labels, whis=(5, 95), showfliers=False, widths=0.6,
                       patch_artist=True, medianprops={"color": "white", "lw": 2},
                       orientation="horizontal")
    for patch, colour in zip(drawn["boxes"], colours):
        patch.set(facecolor=colour)


def plot_matches(part, files, n_pairs):
    """The best matches of each kind of image, a row each, with their distances."""
    for ax, (kind, file) in zip(part.subplots(1, len(files), squeeze=False).flat, files.items()):
        shown, best = file["shown"], file["best"]
        ax.imshow(harness.grid(shown.reshape(-1, *shown.shape[2:]), 5, pad=2),
                  interpolation="nearest")
        grey, at = 127.5 / shown[0, 0].size ** 0.5, (np.arange(5) + 0.5) * (shown.shape[-1] + 2)
        ax.set_xticks(at, ["image", "average", "parent", "parent", "nearest"],
                      fontsize=min(7, 21 / len(files)))
        ax.set_yticks(at[:len(best)], [f"{grey * file['d_pair'][i]:.1f}\n"
                                       f"{grey * file['d_image'][i]:.1f}" for i in best])
        ax.tick_params(length=0)
        ax.set(title=f"{kind} (control)" if kind == "held-out" else f"generated, {kind}",
               frame_on=False)
    part.suptitle(f"The best matches of {len(file['d_pair'])} images each: the nearest average of "
                  f"two training images, of {n_pairs:,} pairs,\nand the nearest training image. "
                  "Left: rms distance to both, in grey levels of 255")


def plot_views(part, arms, files, nearer):
    """How much nearer averages are; by arm, D's view over training and at its end."""
    colours = {"held-out": "#56B4E9", "train": "#009E73"}
    axes = part.subplots(2, 1 + len(arms), width_ratios=[1] + [1.1] * len(arms))
    boxes(axes[0, 0], [(f"{k}\n{100 * nearer[k]:.3g}%", (f["d_pair"] / f["d_image"])[
        f["d_image"] > 0], colours.get(k) or harness.style(k)["color"]) for k, f in files.items()])
    axes[0, 0].set(title="how much nearer averages are\n(%: of images nearer to one)",
                   xlabel="distance to average / to image")
    for (arm, here), (upper, lower) in zip(arms.items(), axes[:, 1:].T):
        draw_curves(upper, PHOTOS_SHOWN, [r["curve"] for r in here],
                    lambda p, kind: p[f"d_{kind}"] - p["d_fake"])
        upper.set(title=f"D of {arm} over training\n(seeds: {len(here)})", xlabel="updates of G",
                  ylabel="mean D, above generated")
        boxes(lower, [(f"{label}\n{100 * here[0]['above'][k]:.0f}%", files[arm][f"d_{k}"], colour)
                      for k, (label, colour, _) in PHOTOS_SHOWN.items()])
        lower.axvline(here[0]["threshold"], color="#888888", lw=1, ls="--")
        share, own = (100 * here[0][k] for k in ("premise_share", "premise_share_pair"))
        lower.set(xlabel="D at the end\n(%: above dashes)", title=f"{arm}: premise of\n"
                  f"Theorem 3 at {share:.1f}%\n(own margin: {own:.1f}%)")
    axes[1, 0].legend(*axes[0, 1].get_legend_handles_labels(), loc="center")
    axes[1, 0].axis("off")


def plot_photos(rows, cfg, folder):
    """Best matches and how near they are, D's view over training and at its end, GAM -> figure."""
    arms = by_arm([r for r in rows if r["part"] == "combination"])
    first, gam = rows[0], {r["method"]: r for r in reversed(rows) if r["part"] == "gam"}
    files = {a: dict(np.load(folder / f"{a}-s{here[0]['seed']}" / "samples.npz"))
             for a, here in arms.items()}
    train, held, sets = (dict(np.load(folder / "controls-s0" / f"{name}.npz"))
                         for name in ("train", "heldout", "samples"))
    nearer = {a: np.mean([r["nearer_average_fake"] for r in here]) for a, here in arms.items()} | {
        "held-out": first["nearer_average_heldout"], "train": first["nearer_average_train"]}
    fig = harness.figure(9.6)
    top, middle, bottom = fig.subfigures(3, height_ratios=[0.95, 1.9, 1.05])
    plot_matches(top, files | {"held-out": held}, first["pairs_searched"])
    plot_views(middle, arms, files | {"held-out": held, "train": train}, nearer)
    labels = {"held-out": "held-out\nphotographs", "gam": "averages of\nneighbours (GAM)",
              "random pairs": "averages of\nrandom pairs", **{a: f"generated,\n{a}" for a in arms}}
    sets |= {a: file["samples"] for a, file in files.items()}
    for ax, (name, images) in zip(bottom.subplots(1, len(sets)), sets.items()):
        ax.imshow(harness.grid(images, 4), interpolation="nearest")
        ax.set_title("\n".join([labels[name], "{metric} {distance:.3g}\nKID {kid:.2g}".format(
            **gam[name])]))
        ax.axis("off")
    bottom.suptitle(f"{cfg['n_fid']} images each against {gam['gam']['n_real']} training images")
    return fig


def plot(folder):
    """figure.png from the files of a run."""
    result = sweep.read_result(folder, Path(__file__).stem)
    draw = plot_photos if "part" in result["rows"][0] else plot_squares
    harness.save_figure(draw(result["rows"], result["config"], folder), folder)
    return result


def main(argv=None):
    parser = sweep.parser(__doc__, PRESETS, OWN, ARMS | PHOTO_ARMS)
    parser.set_defaults(dataset="geometry", data_dir=data.DATA_DIR)
    args = sweep.parse(parser, __file__, argv)
    if args.plot:
        return plot(args.plot)
    if args.sample:
        return harness.sample(args)
    squares, size = args.dataset == "geometry", args.size or data.SIZES.get(args.dataset, 64)
    presets, arms, run = (PRESETS, ARMS, run_squares) if squares else (
        PHOTOS, PHOTO_ARMS, run_photos)
    args.arms = args.arms or list(arms)
    wrong = [f"--{k.replace('_', '-')}" for k in OF_PHOTOS if squares and vars(args)[k] is not None]
    if wrong := wrong + [f"--arms {arm}" for arm in args.arms if arm not in arms]:
        raise core.UserError(f"{wrong[0]}: not with --dataset {args.dataset}, whose arms are "
                             f"{', '.join(arms)}")
    narrow = {"width": 16} if args.preset == "cpu" and not squares and size > 32 else {}
    cfg = sweep.resolve(args, OWN, COMMON, {"size": size}, presets["paper"], presets[args.preset],
                        narrow, channels=1 if squares else 3)
    pairs = [(arm, seed) for arm in cfg.arms for seed in cfg.seeds]
    runs = [Namespace(**vars(cfg), arm=arm, seed=seed, run=f"{arm}-s{seed}")
            for arm, seed in (pairs if squares else [*pairs, ("controls", 0)])]
    if sweep.announce(runs, args.dry_run):
        return {}
    if squares and cfg.size < 16:
        raise core.UserError(f"--size {cfg.size}: must be at least 16 with --dataset geometry")
    if not sweep.worker():      # what is missing or wrong shows here, before any file
        core.check_batch(cfg, 128) if squares else prepare(cfg)
    folder, rows = sweep.train_all(args, f"{Path(args.dataset).stem}-{args.preset}", runs, run)
    if not squares:     # the controls of the search stand beside each of its results
        known = next(r for r in rows if r["part"] == "controls")
        rows = [known | r if r["part"] == "combination" else r for r in rows if r is not known]
    sweep.write_result(args, folder, runs, rows, claims(rows))
    return plot(folder)


if __name__ == "__main__":
    harness.cli(main)
