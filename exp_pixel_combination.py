"""Figures 3 and 4: D takes pixel-wise combinations of training images for real, and G draws them.

The claim (Sections 4.1 to 4.3), on rectangles (Figure 3, top): trained on two images of three
rectangles each, which share two, a GAN also draws their AND (two rectangles) and OR (four), and
during training D scores them like the real ones. The cure: PCR, with AND and OR as extra negatives
(eq. 13). On photographs: some generated faces are averages of two training images (Figure 3,
bottom), and averages of similar ones make images as good as a GAN's (Figure 4), for D is smooth
where the images are near each other (Theorem 3).

    python exp_pixel_combination.py
    python exp_pixel_combination.py --dataset celeba

Arms: vanilla, pcr. Controls on rectangles: D's score of images of three rectangles elsewhere and
of random pixels. Controls on photographs: the same search for held-out and for training images; D's
score of images as far from a real one as its average is; the FID of held-out images and of averages
of random pairs. An average has an advantage over any image: there are thousands of times as many,
and all are smoother. So held-out photographs, too, are nearer to an average, every one, and only a
difference from them would say something about GANs. Presets: paper, cpu (rectangles at half the
size under five minutes on two cores, photographs under ten), smoke. Ends in result.json and
figure.png.
"""
import argparse
import time
from pathlib import Path

import numpy as np
import torch

import core
import data
import fid
import geometry
import harness

# --------------------------------------------------------------------------------------- rectangles

# Section 4.2 gives the images and about 600 steps (Figure 3). UNSPECIFIED: everything else; the
# loss here is the non-saturating one of eq. (1)'s example, f1 = log x, f2 = log(1 - x).
PRESETS = {
    "paper": dict(
        size=32, model="gan", arch="dcgan", loss="ns", norm_d="none", init_d="dcgan",
        gp_weight=0.0, gp_comb=False, n_dis=1, steps=600, batch=64, lr_g=2e-4, lr_d=2e-4,
        beta1=0.5, beta2=0.9, z_dim=128, width=64, base=4, comb_weight=0.5, flip=False,
        lr_decay=False, ema_beta=0.0,
        n_fid=1024, checks=60, sample_every=100, ckpt_every=100, log_every=10,
        seeds=[0, 1, 2, 3, 4]),
    # DEVIATION: a canvas and squares half as wide, and half the channels.
    "cpu": dict(size=16, width=32, n_fid=512, checks=60, seeds=[0, 1, 2]),
    "smoke": dict(jobs=1, size=16, width=8, z_dim=16, batch=16, steps=4, n_fid=32, checks=2,
                  log_every=2, sample_every=2, ckpt_every=2),
}
ARMS = {"vanilla": False, "pcr": True}
NAMES = ("a", "b", "and", "or")
CURVES = {  # label, colour, dash; told apart in greyscale too
    "real": ("A or B (three)", "#009E73", "-"), "and": ("A AND B (two)", "#D55E00", "--"),
    "or": ("A OR B (four)", "#0072B2", "-."), "three": ("three elsewhere", "#000000", ":"),
    "random": ("random pixels", "#CC79A7", (0, (1, 3))),
}


def images_of(cfg):
    """A, B, their AND and their OR: uint8 (4, 1, H, W), of three, three, two and four squares."""
    return torch.cat(geometry.draw_pairs(1, cfg.size, cfg.size // 4, k=3, seed=cfg.seed))


def copies(known):
    """The training set, uint8 (128, 1, H, W)."""
    # UNSPECIFIED: how batches come from two images. Drawn from 64 copies of each, so that a batch
    # of 64 holds both in changing numbers.
    return known[:2].repeat(64, 1, 1, 1)


def scorer(cfg, known, device):
    """The score of a trainer: what its samples are, and how D scores reals, AND, OR, controls."""
    side, gen = cfg.size // 4, harness.generator(cfg.seed, "cpu")
    density = (known[:2] > 127).float().mean()
    noise = (torch.rand(64, 1, cfg.size, cfg.size, generator=gen) < density).to(torch.uint8) * 255
    shown = dict(zip(NAMES, known.split(1)), random=noise,
                 three=geometry.draw(64, 3, cfg.size, side, seed=cfg.seed + 1))
    shown = {k: core.to_float(v).to(device) for k, v in shown.items()}

    @torch.no_grad()
    def score(trainer):
        x = torch.cat(list(core.generate(trainer.G, cfg.n_fid, cfg.z_dim)))
        n, _ = geometry.count(x, side)
        row = {f"share_{k}": (n == k).float().mean().item() for k in (2, 3, 4)}
        for name in NAMES:  # the same lit pixels, every one
            same = geometry.lit(x) == geometry.lit(shown[name])
            row[f"share_{name}"] = same.flatten(1).all(1).float().mean().item()
        trainer.D.eval()
        row |= {f"d_{k}": trainer.D(v).mean().item() for k, v in shown.items()}
        trainer.D.train()
        return row

    return score


def train(cfg, folder):
    """One arm and seed, from scratch or from its checkpoint -> trainer and the four images."""
    device, known = harness.pick_device(cfg.device), images_of(cfg)
    images, negatives = copies(known), known[2:].to(device)

    def combine(trainer, x_real):
        index = torch.randint(2, (cfg.batch,), generator=trainer.gen, device=device)
        return trainer.shard(trainer.images(index, negatives))

    trainer = core.Trainer(cfg, images, device, combine=combine if ARMS[cfg.arm] else None)
    harness.open_run(folder, cfg, cfg.resume, cfg.data_parallel)
    harness.fit(trainer, folder, scorer(cfg, known, device))
    return trainer, known


def evaluate(cfg, folder, trainer, known):
    """The result rows of a finished run, one a score; keeps some samples for the figure."""
    x = torch.cat(list(core.generate(trainer.G, 48, cfg.z_dim, seed=1))).cpu()
    np.savez(folder / "samples.npz", samples=x, known=known)
    keys = ("step", *(f"share_{k}" for k in (2, 3, 4, *NAMES)), "d_and", "d_or", "d_random",
            "d_three")
    rows = [{"arm": cfg.arm, "seed": cfg.seed, **{k: r[k] for k in keys},
             "share_real": r["share_a"] + r["share_b"], "d_real": (r["d_a"] + r["d_b"]) / 2,
             "n": cfg.n_fid}
            for r in harness.read_rows(folder / "metrics.jsonl") if "share_a" in r]
    harness.write_json(folder / "row.json", rows)


def run(cfg, folder):
    evaluate(cfg, folder, *train(cfg, folder))


def plot_rectangles(result, folder):
    """Shares of samples, D's scores, the four images and samples."""
    rows, cfg = result["rows"], result["config"]
    arms = [a for a in ARMS if any(r["arm"] == a for r in rows)]
    fig = harness.figure(2.4 * len(arms))
    axes = fig.subplots(len(arms), 3, squeeze=False, width_ratios=[1.25, 1.25, 1])
    for arm, (left, middle, right) in zip(arms, axes):
        here = [r for r in rows if r["arm"] == arm]
        seeds = sorted({r["seed"] for r in here})

        for name, (label, colour, dash) in CURVES.items():
            for ax, prefix in ((left, "share_"), (middle, "d_")):
                if prefix + name in here[0]:
                    curves = [([r["step"] for r in here if r["seed"] == s],
                               [r[prefix + name] for r in here if r["seed"] == s]) for s in seeds]
                    harness.band(ax, curves, label, color=colour, ls=dash, lw=1.6)
        left.set(title=f"{arm}: what the samples are (n={len(seeds)} seeds)", ylim=(0, 1),
                 xlabel="updates of G", ylabel="share of samples, exact to the pixel")
        middle.set(title=f"{arm}: how D scores them", xlabel="updates of G", ylabel="logit of D")
        for ax in (left, middle):
            ax.legend()
        known, saved = images_of(argparse.Namespace(**cfg | {"seed": seeds[0]})), []
        if (folder / run_name(here[0]) / "samples.npz").exists():  # else result.json came alone
            with np.load(folder / run_name(here[0]) / "samples.npz") as file:
                saved = [framed(torch.from_numpy(file["samples"]), known)]
        picture = [framed(known, known), torch.full((4, 3, *[s + 4 for s in known.shape[2:]]), 255),
                   *saved]
        right.imshow(harness.grid(torch.cat(picture).to(torch.uint8), 8), interpolation="nearest")
        right.set_title("A, B, AND, OR; below, samples\nframed if equal to one")
        right.axis("off")
    harness.save_figure(fig, folder)


def framed(x, known):
    """Images x (N, 1, H, W), each framed in the colour of the known image it equals, else grey."""
    same = (geometry.lit(x)[:, None] == geometry.lit(known)[None]).flatten(2).all(2)  # (N, 4)
    table = [[int(CURVES[name][1][i:i + 2], 16) for i in (1, 3, 5)]
             for name in ("real", "real", "and", "or")]
    return harness.frame(x, [table[row.int().argmax()] if row.any() else [200, 200, 200]
                          for row in same])


# -------------------------------------------------------------------------------------- photographs

# UNSPECIFIED: the GAN of Figures 3 (bottom) and 4. WGAN-GP as in exp_pcr_natural.py, the critic
# that is meant to be Lipschitz, as Theorem 3 has it. UNSPECIFIED: how many images it sees; here
# 10,000, so that all their 5e7 pairs can be searched.
PHOTOS = {
    "paper": dict(
        model="wgangp", arch="dcgan", loss="wgan", n_dis=5, gp_weight=10.0, norm_d="none",
        init_d="he", steps=None, d_steps=50_000, batch=64, lr_g=2e-4, lr_d=2e-4, beta1=0.5,
        beta2=0.9, z_dim=128, width=64, base=4, comb_weight=0.5, gp_comb=False, flip=False,
        lr_decay=False, ema_beta=0.0, n_train=10_000, n_search=None, n_query=1000, n_view=1000,
        n_fid=5000, n_real=None, dims=2048, checks=20, log_every=100),
    # DEVIATION: sized for two cores: half the width, small batches, larger steps, few of them; the
    # distance of shallower features, so that it has full rank with few images.
    "cpu": dict(batch=8, width=32, n_dis=1, lr_g=5e-4, lr_d=5e-4, n_query=200, n_view=200,
                n_fid=256, n_real=1000, dims=192, checks=10, log_every=20),
    "smoke": dict(jobs=1, steps=4, d_steps=None, n_dis=1, batch=8, width=8, z_dim=16,
                  n_query=4, n_view=8, n_fid=8, n_real=32, checks=2, log_every=2),
}
# By pixels. Small batches, because on two cores they draw faces after as many images as large ones
# need for blots.
CPU = {32: dict(steps=2400), 64: dict(width=16, steps=2400)}
VIEWS = {  # what D is shown, in the same way
    "real": ("training", "#009E73", "-"), "heldout": ("held-out", "#56B4E9", (0, (5, 1))),
    "average": ("average", "#D55E00", "--"), "permuted": ("permuted", "#0072B2", "-."),
    "random": ("random", "#CC79A7", (0, (1, 3))), "fake": ("generated", "#000000", ":"),
}


def flat(x, centre=0.0):
    """Images (N, ...) as rows of float32 (N, F), uint8 ones in [-1, 1]; less `centre`."""
    return (core.to_float(x) if x.dtype == torch.uint8 else x.float()).flatten(1) - centre


def distance(queries, *members, block=512):
    """L2 distance (Q,) of each query to the average of its members, directly, in float64."""
    return torch.cat([(flat(q).double() - sum(flat(m).double() for m in ms) / len(ms)).norm(dim=1)
                      for q, *ms in zip(*(x.split(block) for x in (queries, *members)))])


def products(x, images, centre, block):
    """Dot products (Q, N) of rows x (Q, F) with centred images, and these images' squares (N,)."""
    dot, square = zip(*((x @ a.T, a.square().sum(1))
                        for a in (flat(b, centre) for b in images.split(block))))
    return torch.cat(dot, 1), torch.cat(square)


def nearest_image(queries, images, own=None, block=512):
    """The image nearest to each query in L2, over all images -> index (Q,), distance (Q,) float64.

    queries (Q, ...), images (N, ...), uint8 (in units of [-1, 1]) or float. own (Q,): the index of
    an image that a query is itself, and that is left out for it.
    """
    centre, index = flat(images[:1024]).mean(0), []  # any will do; this one makes small numbers
    for i in range(0, len(queries), block):
        dot, square = products(flat(queries[i:i + block], centre), images, centre, block)
        square = square - 2 * dot
        if own is not None:
            square.scatter_(1, own[i:i + block, None], torch.inf)
        index.append(square.argmin(1))
    index = torch.cat(index)
    return index, distance(queries, images[index])


def nearest_pair(queries, images, own=None, block=512, limit=None):
    """The two images whose average is nearest to each query, over all N (N - 1) / 2 pairs.

    |q - (a + b) / 2|^2 = |q|^2 + u_a + u_b + a.b / 2 with u_a = |a|^2 / 4 - q.a: a smallest sum,
    searched by blocks of a Gram matrix that is never whole; at most `limit` sums at a time.
    -> pairs (Q, 2), distances (Q,) float64. Arguments as of nearest_image; a pair is the nearest
    to the rounding of float32, and its distance is computed directly.
    """
    limit = limit or (2 ** 26 if images.is_cuda else 2 ** 20)  # what a cache holds
    centre, pairs = flat(images[:1024]).mean(0), []
    for start in range(0, len(queries), 1024):
        dot, square = products(flat(queries[start:start + 1024], centre), images, centre, block)
        u = square / 4 - dot                                                    # (Q, N)
        if own is not None:
            u.scatter_(1, own[start:start + 1024, None], torch.inf)
        least, first = torch.full_like(u[:, 0], torch.inf), torch.zeros_like(u[:, 0]).long()
        for i in range(0, len(images), block):
            a = flat(images[i:i + block], centre) / 2
            for j in range(i, len(images), block):
                half = a @ flat(images[j:j + block], centre).T                  # (rows, columns)
                if i == j:                                                      # each pair once
                    half += torch.full_like(half, torch.inf).tril()
                step = max(limit // half.numel(), 1)
                for k in range(0, len(u), step):
                    here = slice(k, k + step)
                    sums = (half + u[here, None, j:j + block]).amin(2)          # (step, rows)
                    value, row = (sums + u[here, i:i + block]).min(1)
                    first[here] = torch.where(value < least[here], row + i, first[here])
                    least[here] = torch.minimum(value, least[here])
        u += products(flat(images[first], centre), images, centre, block)[0] / 2
        u.scatter_(1, first[:, None], torch.inf)
        pairs.append(torch.stack([first, u.argmin(1)], 1).sort(1).values)
    pairs = torch.cat(pairs)
    return pairs, distance(queries, *(images[i] for i in pairs.T))


def average(a, b):
    """Average of uint8 images, rounded, as generated ones are."""
    return ((a.float() + b.float()) / 2).round().to(torch.uint8)


def search(queries, images, device, own=None, n_show=3):
    """How near queries are to averages and to images -> numbers, and arrays for the figure.

    nearer_average: share that is nearer to an average than to any image; ratio: mean distance to
    the nearest average in parts of that to the nearest image. Of use beside a control only.
    """
    queries, images = queries.to(device), images.to(device)
    image, d_image = nearest_image(queries, images, own)
    pair, d_pair = nearest_pair(queries, images, own)
    best = d_pair.argsort()[:n_show]  # as the paper does, those that suit the claim best
    a, b = images[pair[best, 0]], images[pair[best, 1]]
    shown = torch.stack([queries[best], average(a, b), a, b, images[image[best]]], 1)
    kept = {"d_pair": d_pair, "d_image": d_image, "best": best, "shown": shown}
    return {"nearer_average": (d_pair < d_image).double().mean().item(),
            "ratio": (d_pair.mean() / d_image.mean()).item(),
            "distance": d_pair.mean().item()}, {k: v.cpu() for k, v in kept.items()}


def similar_pairs(images, n):
    """GAM's pairs: the first 2n images, each with its nearest other one, the first n different."""
    # UNSPECIFIED: which images are "structurally similar". Nearest neighbours, pixel by pixel.
    own = torch.arange(min(2 * n, len(images)), device=images.device)
    near, _ = nearest_image(images[own], images, own)
    pairs = torch.stack([own, near], 1).sort(1).values.tolist()
    return torch.tensor(list(dict.fromkeys(map(tuple, pairs)))[:n])


def same_distance(x, gen):
    """Three images as far from each x (B, C, H, W) as each other, not clipped (that would bring
    them nearer): its average with another one; a step in a random direction; the step to the
    average with its pixels permuted, colours kept together."""
    x_comb = core.pixel_average(x)
    step, away = x_comb - x, torch.randn(x.shape, generator=gen)
    length = step.flatten(1).norm(dim=1) / away.flatten(1).norm(dim=1)
    place = torch.rand(len(x), 1, x[0, 0].numel(), generator=gen).argsort(2)
    moved = step.flatten(2).gather(2, place.expand(-1, x.shape[1], -1)).view_as(x)
    return x_comb, x + away * length.view(-1, 1, 1, 1), x + moved


def premise(D, x, threshold, block=64):
    """Theorem 3's premise on f = D - threshold, for neighbours in x (N, C, H, W) -> numbers.

    premise_share: of all points (pair, lambda), lambda uniform, the share where eps > L delta
    min(lambda, 1 - lambda), with eps the least f on x (Assumption 2), 0 if that is not positive;
    premise_share_pair: with the lesser f of the pair, all that the proof needs. Both are upper
    bounds: `lipschitz` is the steepest that D was found on these segments, and L is no less.
    segment_share: where f > 0. The premise is the same for the controls as far away.
    """
    lam, f, slopes = torch.linspace(0, 1, 11, device=x.device).view(-1, 1, 1, 1, 1), [], []
    for a, b in zip(x.split(block), x.roll(1, 0).split(block)):
        points = torch.lerp(a, b, lam).requires_grad_()                     # (11, B, C, H, W)
        d = D(points.flatten(0, 1)).view(11, -1)
        slopes.append(torch.autograd.grad(d.sum(), points)[0].flatten(2).norm(dim=2).max())
        f.append(d.detach() - threshold)
    f, delta = torch.cat(f, 1), (x - x.roll(1, 0)).flatten(1).norm(dim=1).clamp(min=1e-9)
    lipschitz = torch.stack([*slopes, (f.diff(dim=0).abs() * 10 / delta).max()]).max()
    least, widest = torch.minimum(f[0], f[-1]), lipschitz.clamp(min=1e-9) * delta / 2
    return {"premise_share": (least.min() / widest).clamp(0, 1).mean().item(),
            "premise_share_pair": (least / widest).clamp(0, 1).mean().item(),
            "segment_share": (f[1:-1] > 0).float().mean().item(), "margin": least.min().item(),
            "lipschitz": lipschitz.item(), "delta": delta.mean().item()}


def shuffled(images):
    return images[torch.randperm(len(images), generator=harness.generator(0, "cpu"))]


def prepare(cfg):
    """Training and held-out images, in random order, and the score of an image set (FID, KID)."""
    device = harness.pick_device(cfg.device)
    images = shuffled(data.load(cfg.dataset, cfg.size, cfg.data_dir, "train"))[:cfg.n_train]
    heldout = shuffled(data.load(cfg.dataset, cfg.size, cfg.data_dir, "test"))
    core.check_batch(cfg, images)
    n, m = len(images), len(heldout)
    limits = {"n_train": (2, 10 ** 9), "n_search": (3, n), "n_real": (2, n),
              "n_query": (2, min(cfg.n_search or n, m)), "n_view": (2, min(n, m)),
              "n_fid": (2, min(n // 2, m))}
    if wrong := [f"--{k.replace('_', '-')} {getattr(cfg, k)} must be from {low} to {high}"
                 for k, (low, high) in limits.items()
                 if getattr(cfg, k) is not None and not low <= getattr(cfg, k) <= high]:
        raise harness.UserError(f"{'; '.join(wrong)}: {cfg.dataset} has {n} training and {m} "
                                "held-out images")
    net = fid.load_inception(dims=cfg.dims, weights=cfg.fid_weights, data_dir=cfg.data_dir,
                             device=device)
    reference = fid.reference(net, images[-(cfg.n_real or n):], cfg.data_dir / "cache")

    def score(x):
        row = fid.score(net, *reference, x.split(fid.BATCH))
        return {"fid": row["fid"], "kid": row["kid"], "kid_std": row["kid_std"], "n": len(x),
                "n_real": cfg.n_real or n, "score": net.label, "features": net.id,
                "dims": len(reference[0].mean)}

    return images, heldout, score


def viewer(cfg, images, heldout, device):
    """What D is shown, the same every time, and D's scores of it: trainer -> {kind: (n_view,)}."""
    x = core.to_float(images[:cfg.n_view])
    x_comb, away, moved = same_distance(x, harness.generator(0, "cpu"))
    shown = dict(real=x, heldout=core.to_float(heldout[:cfg.n_view]), average=x_comb, random=away,
                 permuted=moved)
    shown = {k: v.to(device) for k, v in shown.items()}

    @torch.no_grad()
    def view(trainer):
        training, fakes = trainer.D.training, core.generate(trainer.G, cfg.n_view, cfg.z_dim)
        everything = shown | {"fake": core.to_float(torch.cat(list(fakes)))}
        trainer.D.eval()
        scores = {k: torch.cat([trainer.D(b) for b in v.split(256)])
                  for k, v in everything.items()}
        trainer.D.train(training)
        return scores

    return shown, view


def train_photos(cfg, folder):
    """One arm and seed, from scratch or from its checkpoint -> what evaluate_photos needs."""
    device, (images, heldout, score) = harness.pick_device(cfg.device), prepare(cfg)
    shown, view = viewer(cfg, images, heldout, device)
    combine = (lambda trainer, x_real: core.pixel_average(x_real)) if ARMS[cfg.arm] else None
    trainer = core.Trainer(cfg, images, device, combine=combine)
    harness.open_run(folder, cfg, cfg.resume, cfg.data_parallel)
    harness.fit(trainer, folder, lambda trainer: {
        f"d_{k}": v.mean().item() for k, v in view(trainer).items()})
    return trainer, images, score, shown["real"], view


def evaluate_photos(cfg, folder, trainer, images, score, x, view):
    """The two rows of a finished run, pair search and D's view, and FID; arrays for the figure."""
    fakes = core.generate(trainer.G, max(cfg.n_fid, cfg.n_query), cfg.z_dim)
    fakes = torch.cat([batch.cpu() for batch in fakes])
    found, kept = search(fakes[:cfg.n_query], images[:cfg.n_search], trainer.device)
    seen = view(trainer)
    # UNSPECIFIED: above which score D takes an image for real, as the zero of a WGAN's critic
    # means nothing. Halfway between its means on training images and on fakes.
    threshold = (seen["real"].mean() + seen["fake"].mean()) / 2
    trainer.D.eval()
    row = {"part": "combination", "arm": cfg.arm, "seed": cfg.seed,
           **{f"{k}_fake": v for k, v in found.items()},
           **{f"d_{k}": v.mean() for k, v in seen.items()}, **premise(trainer.D, x, threshold),
           "threshold": threshold,
           "above": {k: (v > threshold).float().mean() for k, v in seen.items()},
           "curve": [{k: r[k] for k in ("step", *(f"d_{v}" for v in VIEWS))}
                     for r in harness.read_rows(folder / "metrics.jsonl") if "d_heldout" in r]}
    np.savez(folder / "samples.npz", samples=fakes[:16], **kept,
             **{f"d_{k}": v.cpu() for k, v in seen.items()})
    gam = {"part": "gam", "method": cfg.arm, "seed": cfg.seed, **score(fakes[:cfg.n_fid])}
    harness.write_json(folder / "row.json", [row, gam])


def controls(cfg, folder):
    """What needs no GAN: the pair search for real images, GAM, and the sets beside it."""
    device, (images, heldout, score) = harness.pick_device(cfg.device), prepare(cfg)
    harness.open_run(folder, cfg, cfg.resume)
    known, row = images[:cfg.n_search], {"pairs_searched": 0}
    row["pairs_searched"], kept = len(known) * (len(known) - 1) // 2, {}
    for name, queries, own in (("heldout", heldout, None), ("train", known, torch.arange(
            cfg.n_query, device=device))):  # a training image is no member of its own pairs
        found, arrays = search(queries[:cfg.n_query], known, device, own)
        row |= {f"{k}_{name}": v for k, v in found.items()}
        kept |= {f"{k}_{name}": v for k, v in arrays.items()}
    pairs, n = similar_pairs(images.to(device), cfg.n_fid), cfg.n_fid
    sets = {"held-out": heldout[:n], "gam": average(*images[pairs.T]),
            "random pairs": average(images[:n], images[n:2 * n])}
    np.savez(folder / "samples.npz", **kept, **{k: v[:16] for k, v in sets.items()})
    harness.write_json(folder / "row.json", [row, *(
        {"part": "gam", "method": k, "seed": None, **score(v)} for k, v in sets.items())])


def run_photos(cfg, folder):
    if cfg.arm == "controls":
        if not (cfg.data_parallel and harness.join()):
            controls(cfg, folder)
    else:
        evaluate_photos(cfg, folder, *train_photos(cfg, folder))


def boxes(ax, values, labels, colours, **more):
    """Box plots with whiskers from 5 to 95%."""
    drawn = ax.boxplot(values, tick_labels=labels, whis=(5, 95), showfliers=False, widths=0.6,
                       patch_artist=True, medianprops={"color": "white", "lw": 2}, **more)
    for patch, colour in zip(drawn["boxes"], colours):
        patch.set(facecolor=colour)


def plot_photos(result, folder):
    """Best matches and how near they are, D's view over training and at its end, GAM's images."""
    rows, cfg = [r for r in result["rows"] if r["part"] == "combination"], result["config"]
    first = {a: next(r for r in rows if r["arm"] == a) for a in ARMS if a in cfg["arms"]}
    files = {a: dict(np.load(folder / run_name(r) / "samples.npz")) for a, r in first.items()}
    with np.load(folder / "controls-s0" / "samples.npz") as saved:
        for kind in ("heldout", "train"):
            files[kind] = {k: saved[f"{k}_{kind}"] for k in ("d_pair", "d_image", "best", "shown")}
        grids = {k: saved[k] for k in ("held-out", "gam", "random pairs")}
    grids |= {a: files[a]["samples"] for a in first}
    names = {a: a for a in first} | {"heldout": "held-out", "train": "train"}
    colours = [harness.STYLE[a]["color"] for a in first] + ["#56B4E9", "#009E73"]
    fig = harness.figure(9.6)
    top, middle, bottom = fig.subfigures(3, height_ratios=[0.95, 1.9, 1.05])

    for ax, kind in zip(np.atleast_1d(top.subplots(1, len(first) + 1)), files):
        shown, best = files[kind]["shown"], files[kind]["best"]
        ax.imshow(harness.grid(torch.from_numpy(shown).flatten(0, 1), 5, pad=2),
                  interpolation="nearest")
        level = 127.5 / shown[0, 0].size ** 0.5
        middles = (np.arange(5) + 0.5) * (shown.shape[-1] + 2)
        ax.set_xticks(middles, ["image", "average", "parent", "parent", "nearest"])
        ax.set_yticks(middles[:len(best)], [
            f"{a:.1f}\n{b:.1f}" for a, b in zip(*(level * files[kind][k][best]
                                                  for k in ("d_pair", "d_image")))])
        ax.tick_params(length=0)
        ax.set_title(names[kind] + " (control)" if kind == "heldout" else f"generated, {kind}")
        ax.set_frame_on(False)
    top.suptitle(f"The best matches of {cfg['n_query']} images each: the nearest average of two "
                 f"training images, of {rows[0]['pairs_searched']:,} pairs,\nand the nearest "
                 "training image. Left: rms distance to both, in grey levels of 255")

    axes = middle.subplots(2, 1 + len(first), width_ratios=[1] + [1.1] * len(first))
    nearer = [np.mean([r["nearer_average_fake"] for r in rows if r["arm"] == a]) for a in first]
    bars = axes[0, 0].bar(list(names.values()), [*nearer, rows[0]["nearer_average_heldout"],
                                                 rows[0]["nearer_average_train"]], color=colours)
    axes[0, 0].bar_label(bars, fmt="{:.3f}")
    axes[0, 0].set_title("nearer to an average\nthan to any image")
    axes[0, 0].set(ylabel="share of images", ylim=(0, 1.12))
    boxes(axes[1, 0], [(f["d_pair"] / f["d_image"])[f["d_image"] > 0] for f in files.values()],
          list(names.values()), colours)
    axes[1, 0].set_title("how much nearer\n(whiskers: 5 and 95%)")
    axes[1, 0].set_ylabel("distance to average / to image")
    for (arm, row), (upper, lower) in zip(first.items(), axes[:, 1:].T):
        here, kinds = [r for r in rows if r["arm"] == arm], list(VIEWS)[::-1]
        for kind, (label, colour, dash) in VIEWS.items():
            curves = [([p["step"] for p in r["curve"]],
                       [p[f"d_{kind}"] - p["d_fake"] for p in r["curve"]]) for r in here]
            harness.band(upper, curves, label, color=colour, ls=dash, lw=1.6)
        upper.set(xlabel="updates of G", ylabel="mean D, above generated")
        upper.set_title(f"D of {arm} over training\n(seeds: {len(here)})")
        boxes(lower, [files[arm][f"d_{k}"] for k in kinds],
              [f"{VIEWS[k][0]}\n{100 * row['above'][k]:.0f}%" for k in kinds],
              [VIEWS[k][1] for k in kinds], orientation="horizontal")
        lower.axvline(row["threshold"], color="#888888", lw=1, ls="--")
        lower.set_xlabel("D at the end (%: above dashes)")
        lower.set_title(f"{arm}: premise of Theorem 3 at\n{100 * row['premise_share']:.1f}% of "
                        f"points ({100 * row['premise_share_pair']:.1f}%, own margin)")
    middle.legend(*axes[0, 1].get_legend_handles_labels(), loc="outside lower center", ncols=6)

    gam = {r["method"]: r for r in reversed(result["rows"]) if r["part"] == "gam"}
    label = {"gam": "averages of\nneighbours (GAM)", "held-out": "held-out\nphotographs",
             "random pairs": "averages of\nrandom pairs", **{a: f"generated,\n{a}" for a in first}}
    for ax, name in zip(bottom.subplots(1, len(grids)), grids):
        ax.imshow(harness.grid(torch.from_numpy(grids[name]), 4), interpolation="nearest")
        ax.set_title(f"{label[name]}\n{gam[name]['score']} {gam[name]['fid']:.3g}\n"
                     f"KID {gam[name]['kid']:.2g}")
        ax.axis("off")
    bottom.suptitle(f"{cfg['n_fid']} images each against {gam['gam']['n_real']} training images")
    harness.save_figure(fig, folder)


# -------------------------------------------------------------------------------------- the command


def flags():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dataset", default="geometry",
                   help="geometry, celeba, cifar10, imagenet, or a folder or zip of images "
                        "(%(default)s)")
    p.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, help="(%(default)s)")
    p.add_argument("--size", type=int, help="pixels; preset for rectangles (squares are a quarter),"
                                            " 32 for cifar10, else 64")
    g = p.add_argument_group("photographs (default: the preset's value)")
    g.add_argument("--data-dir", type=Path, default=data.DATA_DIR,
                   help="data sets, weights and caches; or set GAN_DATA (%(default)s)")
    g.add_argument("--n-train", type=int, help="training images, at most; drawn at random")
    g.add_argument("--n-search", type=int, help="search the pairs of so many of them; default all")
    g.add_argument("--n-query", type=int, help="images of each kind to search a pair for")
    g.add_argument("--n-view", type=int, help="images of each kind that D is shown")
    g.add_argument("--n-real", type=int, help="training images in the reference; default all")
    g.add_argument("--dims", type=int, choices=[64, 192, 768, 2048], help="FID features")
    g.add_argument("--fid-weights", help="Inception weights; default: data-dir or a download")
    harness.run_flags(p, PRESETS)
    core.train_flags(p)
    return p


def check(cfg):
    """UserError for what is missing or wrong, before anything is written."""
    if cfg.dataset != "geometry":
        prepare(cfg)
    elif cfg.size < 16:
        raise harness.UserError(f"--size {cfg.size}: must be at least 16")
    else:
        core.check_batch(cfg, copies(images_of(argparse.Namespace(size=cfg.size, seed=0))))


def run_name(row):
    return f"{row['arm']}-s{row['seed']}"


def plot(folder):
    """figure.png from the files of a run."""
    result = harness.read_result(folder, Path(__file__).stem)
    squares = result["config"]["dataset"] == "geometry"
    (plot_rectangles if squares else plot_photos)(result, folder)
    return result


def main(argv=None):
    args, start = flags().parse_args(argv), time.time()
    if args.plot:
        return plot(args.plot)
    device = harness.pick_device(args.device)
    if args.sample:
        return core.sample_checkpoint(args.sample, args.n, args.out, device)
    name, squares = args.preset or ("paper" if device.type == "cuda" else "cpu"), \
        args.dataset == "geometry"
    presets, one_run = (PRESETS, run) if squares else (PHOTOS, run_photos)
    for key in {*PHOTOS["paper"]} - {*PRESETS["paper"], "d_steps"}:
        if squares and getattr(args, key) is not None:
            raise harness.UserError(f"--{key.replace('_', '-')}: not with --dataset geometry")
    size = data.SIZES.get(args.dataset, 64) if args.size is None else args.size
    cfg = core.resolve(args, {} if squares else {"size": size}, presets["paper"], presets[name],
                       {} if squares or name != "cpu" else CPU[32 if size <= 32 else 64],
                       preset=name, channels=1 if squares else 3)
    if harness.announce([cfg], args.dry_run):
        return {}
    check(cfg)
    folder = harness.open_run(args.outdir / Path(__file__).stem / (
        args.name or f"{Path(args.dataset).stem}-{name}"), cfg, args.resume, sweep=True)
    ones = [argparse.Namespace(**vars(cfg), arm=a, seed=s) for a in cfg.arms for s in cfg.seeds]
    ones += [] if squares else [argparse.Namespace(**vars(cfg), arm="controls", seed=0)]
    rows = harness.run_all(one_run, [(one, folder / run_name(vars(one))) for one in ones],
                           cfg.jobs, device)
    paper = {"figure_3": "AND and OR are drawn, and scored like the reals in the earlier stage"}
    if not squares:
        found, known = zip(*rows[:-1]), rows[-1]
        rows = [row | known[0] for row in next(found)] + known[1:] + [*next(found)]
        paper = {"figure_3": "certain generated faces are averages of training images",
                 "figure_4": "GAM and GANs are comparable by FID"}
        for row in rows:
            print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                            for k, v in row.items() if not isinstance(v, (dict, list))))
    else:
        rows = sum(rows, [])
    harness.write_result(folder, Path(__file__).stem, cfg, device, start, rows, paper)
    return plot(folder)


if __name__ == "__main__":
    harness.cli(main)
