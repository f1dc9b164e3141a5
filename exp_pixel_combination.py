"""Figures 3 and 4: D takes pixel-wise combinations of training images for real, and G draws them.

Rectangles (Section 4.2): trained on two images of three, which share two, a GAN also draws their
AND and OR, and early on D scores them like reals; PCR makes both extra negatives. Photographs
(Section 4.3): some fakes are averages of two training images, and averages of similar ones ("GAM")
are as good as fakes, because D is smooth where images are near (Theorem 3).

    python exp_pixel_combination.py [--dataset celeba]

Controls: other rectangles, random pixels; the search for real photographs; images as far from one
as its average is; averages of random pairs. Presets: paper, cpu (five minutes on two cores,
photographs ten), smoke.
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
SMOKE = dict(jobs=1, width=8, z_dim=16, steps=4, checks=2, log_every=2)
# UNSPECIFIED: the rectangles' GAN, but for its two images and about 600 steps (Section 4.2). The
# loss is the non-saturating one of eq. (1)'s example, f1 = log x, f2 = log(1 - x).
PRESETS = {
    "paper": dict(size=32, loss="ns", init_d="dcgan", gp_weight=0.0, n_dis=1, steps=600,
                  n_fid=1024, checks=60, log_every=10, seeds=[0, 1, 2, 3, 4]),
    # DEVIATION: rectangles on a CPU. Canvas and squares are half as wide, with half the channels.
    "cpu": dict(size=16, width=32, n_fid=512, seeds=[0, 1, 2]),
    "smoke": SMOKE | dict(size=16, batch=16, n_fid=32)}
# UNSPECIFIED: the GAN of Figures 3 (bottom) and 4. WGAN-GP as in exp_pcr_natural.py, whose critic
# is meant to be Lipschitz, as Theorem 3 has it.
# UNSPECIFIED: how many photographs it sees. 10,000, so that all their 5e7 pairs can be searched.
PHOTOS = {
    "paper": dict(loss="wgan", init_d="he", gp_weight=10.0, n_dis=5, d_steps=50_000, n_query=1000,
                  n_train=10_000, n_fid=5000, dims=2048, checks=20, log_every=100),
    # DEVIATION: photographs on a CPU. Half the width or less, few and larger steps, the distance
    # of early features, which has full rank with few images. Small batches, because two cores draw
    # faces after as many images as large ones need for blots.
    "cpu": dict(steps=2400, batch=8, width=32, n_dis=1, lr_g=5e-4, lr_d=5e-4, n_query=200,
                n_fid=256, n_real=1000, dims=192, checks=10, log_every=20),
    "smoke": SMOKE | dict(n_dis=1, batch=8, n_query=4, n_fid=8, n_real=32, dims=64)}
OF_PHOTOS = {
    "n_query": (int, 2, 10 ** 9, "images of each kind to search pairs for, and that D is shown"),
    **{k: (data.FLAGS | fid.FLAGS)[k] for k in ("n_train", "n_real", "dims", "fid_weights")}}
OWN = {"dataset": (str, "geometry (rectangles), cifar10, celeba, imagenet, or a folder or zip of "
                        "images (%(default)s)"), "data_dir": data.FLAGS["data_dir"], **OF_PHOTOS}


def pcr(t, x_real, x_fake):
    """Eq. (13): half of the negative weight goes to combinations of two training images."""
    if t.cfg.dataset != "geometry":
        return core.d_loss(t, x_real, x_fake, x_comb=core.pixel_average(x_real))
    index = torch.randint(len(t.pool), (t.cfg.batch,), generator=t.gen, device=t.device)
    return core.d_loss(t, x_real, x_fake, x_comb=t.images(index, t.pool))   # the AND and the OR


# An arm is d_loss(t, x_real, x_fake) -> (loss, {name: tensor}).
ARMS = {"vanilla": core.d_loss, "pcr": pcr}
# What D is shown, in the colour and dash of which arm.
SHOWN = {"real": "sc+pcr", "heldout": "dup", "and": "pcr", "average": "pcr", "or": "sc",
         "three": "vanilla", "fake": "vanilla", "random": "random"}


def look(D, shown):
    """D's scores in eval mode: {kind: images (N, C, H, W)} -> {kind: (N,)}."""
    return {k: torch.cat([*core.generate(D, x)]) for k, x in shown.items()}


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


def flat(x):
    """Images (N, ...) as rows of float32 (N, F), uint8 ones in [-1, 1]."""
    return (core.to_float(x) if x.dtype == torch.uint8 else x.float()).flatten(1)


def distance(queries, *members, block=512):
    """L2 distance (Q,) of each query to the average of its members, directly, in float64."""
    return torch.cat([(flat(q).double() - sum(flat(m).double() for m in ms) / len(ms)).norm(dim=1)
                      for q, *ms in zip(*(x.split(block) for x in (queries, *members)))])


def nearest_image(queries, images, own=None, block=512):
    """The image nearest to each query in L2 -> index (Q,), distance (Q,) float64. queries (Q, ...),
    images (N, ...), uint8 (in units of [-1, 1]) or float. own (Q,): the index of an image that a
    query is itself, and that is left out for it."""
    centre, index = flat(images).mean(0), []
    x = flat(images) - centre                                           # small numbers round less
    for i in range(0, len(queries), block):
        u = x.square().sum(1) - 2 * ((flat(queries[i:i + block]) - centre) @ x.T)
        if own is not None:
            u.scatter_(1, own[i:i + block, None], torch.inf)
        index.append(u.argmin(1))
    return torch.cat(index), distance(queries, images[torch.cat(index)])


def nearest_pair(queries, images, own=None, block=64, limit=None):
    """The two images whose average is nearest to each query, over all N (N - 1) / 2 pairs: a
    smallest sum u_a + u_b + 2 a.b = |2 q - a - b|^2 - |2 q|^2 with u_a = |a|^2 - 4 q.a, searched
    by `block` rows of a Gram matrix that is never whole, about `limit` sums at a time. -> pairs
    (Q, 2), distances (Q,) float64. Arguments as of nearest_image; to the rounding of float32."""
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


def search(queries, images, device, own=None):
    """How near queries are to averages and to images -> numbers: share nearer to an average than to
    any image; l2 to the nearest average; ratio of that to the nearest image's; arrays to draw."""
    queries, images = queries.to(device), images.to(device)
    image, d_image = nearest_image(queries, images, own)
    pair, d_pair = nearest_pair(queries, images, own)
    best = d_pair.argsort()[:3]     # as the paper does, those that suit the claim best
    a, b = images[pair[best].T]
    shown = torch.stack([queries[best], average(a, b), a, b, images[image[best]]], 1)
    return {"nearer_average": (d_pair < d_image).double().mean().item(), "l2": d_pair.mean().item(),
            "ratio": (d_pair.mean() / d_image.mean()).item()}, {
                "d_pair": d_pair.cpu(), "d_image": d_image.cpu(), "shown": shown.cpu()}


def similar_pairs(images, n):
    """GAM's pairs: the first 2n images, each with its nearest other one, the first n different."""
    # UNSPECIFIED: which images are "structurally similar". Nearest neighbours, pixel by pixel.
    own = torch.arange(min(2 * n, len(images)), device=images.device)
    pairs = torch.stack([own, nearest_image(images[own], images, own)[0]], 1).sort(1).values
    return torch.tensor(list(dict.fromkeys(map(tuple, pairs.tolist())))[:n])


def same_distance(x, gen):
    """Two images as far from each x (B, C, H, W) as each other: its average with another one, and a
    step in a random direction, not clipped, which would bring it nearer."""
    made, away = core.pixel_average(x), torch.randn(x.shape, generator=gen)
    length = (made - x).flatten(1).norm(dim=1) / away.flatten(1).norm(dim=1)
    return made, x + away * length.view(-1, 1, 1, 1)


def prepare(cfg):
    """Training and held-out images, in random order, and gam_row(method, seed, images) -> row."""
    images, heldout = (x[torch.randperm(len(x), generator=core.generator(0))][:cfg.n_train]
                       for x in (data.load(cfg.dataset, cfg.size, cfg.data_dir, split)
                                 for split in ("train", "test")))
    n, m = len(images), len(heldout)
    core.check_batch(cfg, n)
    for key, most in {"n_real": n, "n_query": min(n, m), "n_fid": min(n // 2, m)}.items():
        if (vars(cfg)[key] or 0) > most:
            raise core.UserError(f"--{key.replace('_', '-')} {vars(cfg)[key]}: at most {most}, for "
                                 f"{cfg.dataset} has {n} training and {m} held-out images")
    device = harness.pick_device(cfg.device)
    net = fid.load_inception(dims=cfg.dims, weights=cfg.fid_weights, data_dir=cfg.data_dir,
                             device=device, precision=cfg.precision)
    reference = fid.reference(net, images[-(cfg.n_real or n):], cfg.data_dir / "cache", device)

    def gam_row(method, seed, x):
        return {"part": "gam", "method": method, "seed": seed, "n": len(x), "n_real":
                cfg.n_real or n, "metric": net.label, "features": net.id, "dims":
                len(reference[0].mean), **fid.score(net, *reference, x.split(fid.BATCH))}

    return images, heldout, gam_row


def run_photos(cfg, folder):
    """Train one arm with one seed -> two rows, of the pair search and D's view, and of the FID."""
    images, heldout, gam_row = prepare(cfg)
    t = core.Trainer(cfg, images.to(harness.pick_device(cfg.device)), *core.build(cfg),
                     d_loss=ARMS[cfg.arm])
    real, heldout = (core.to_float(x[:cfg.n_query]) for x in (images, heldout))
    shown = {k: x.to(t.device) for k, x in zip(("average", "random", "real", "heldout"), (
        *same_distance(real, core.generator(0)), real, heldout))}

    def view(t):
        return look(t.D, shown | {"fake": core.to_float(torch.cat([*t.fakes(cfg.n_query)[""]]))})

    harness.fit(t, folder, lambda t: {f"d_{k}": v.mean().item() for k, v in view(t).items()})
    seen, fakes = view(t), torch.cat([x.cpu() for x in t.fakes(max(cfg.n_fid, cfg.n_query))[""]])
    found, arrays = search(fakes[:cfg.n_query], images, t.device)
    # UNSPECIFIED: above which score D takes an image for real, as the zero of a WGAN's critic
    # means nothing. Halfway between its means on training images and on fakes.
    threshold = (seen["real"].mean() + seen["fake"].mean()) / 2
    with harness.atomic(folder / "samples.npz") as tmp:
        np.savez(tmp, samples=fakes[:16], **arrays)
    return [{"part": "combination", "dataset": Path(cfg.dataset).name, "arm": cfg.arm,
             "seed": cfg.seed, "d_steps": cfg.d_steps, "threshold": threshold,
             **{f"{k}_fake": v for k, v in found.items()},
             **{f"d_{k}": v.mean() for k, v in seen.items()},
             "above": {k: (v > threshold).float().mean() for k, v in seen.items()},
             "curve": [{k: r[k] for k in ("step", *(f"d_{v}" for v in seen))}
                       for r in harness.read_rows(folder / "metrics.jsonl") if "d_heldout" in r]},
            gam_row(cfg.arm, cfg.seed, fakes[:cfg.n_fid])]


def controls(cfg, folder, rows):
    """The rows, with the pair search for real images, and those of GAM and the sets beside it."""
    device, (images, heldout, gam_row), n = harness.pick_device(cfg.device), prepare(cfg), cfg.n_fid
    itself = torch.arange(cfg.n_query, device=device)   # is not to be in its own pair
    known = {"pairs_searched": len(images) * (len(images) - 1) // 2}
    for kind, queries, own in (("train", images, itself), ("heldout", heldout, None)):
        found, arrays = search(queries[:cfg.n_query], images, device, own)
        known |= {f"{k}_{kind}": v for k, v in found.items()}
    pairs = similar_pairs(images.to(device), n)
    sets = {"held-out": heldout[:n], "gam": average(*images[pairs.T]),
            "random pairs": average(images[:n], images[n:2 * n])}
    with harness.atomic(folder / "controls.npz") as tmp:
        np.savez(tmp, **arrays, **{k: x[:16] for k, x in sets.items()})
    return [known | r if r["part"] == "combination" else r for r in rows] + [
        gam_row(k, None, x) for k, x in sets.items()]


def claims(rows):
    """Figure 3, top, or Figures 3, bottom, and 4, of rows with vanilla."""
    first, arms = rows[0], list(dict.fromkeys(r["arm"] for r in rows if "arm" in r))
    names, n = ", ".join(arms), len({r["seed"] for r in rows if "arm" in r})
    if "part" in first:
        held = first["nearer_average_heldout"]
        near = {a: sweep.values(rows, "nearer_average_fake", arm=a) for a in arms}
        sets = {k: sweep.values(rows, "distance", method=k) for k in (*arms, "gam", "held-out")}
        found = [(
            "Figure 3, bottom", f"{first['dataset']}: images nearer to an average of two training "
            f"images than to any: {names}, held-out", "generated ones are averages",
            ", ".join(sweep.spread(v, 100) for v in (*near.values(), [held])),
            "no: photographs are, too" if held > 0.5 else
            "holds" if np.mean(near["vanilla"]) > 0.5 else "no"), (
            # UNSPECIFIED: what "comparable" is. Within a factor of two, for a GAN of full length.
            "Figure 4", f"{first['dataset']}: {rows[-1]['metric']} of {names}, averages of "
            "neighbours (GAM), held-out", "GAM and GAN comparable",
            ", ".join(map(sweep.spread, sets.values())), "not decided: the GAN is small"
            if first["d_steps"] < PHOTOS["paper"]["d_steps"] else
            "holds" if 0.5 < np.mean(sets["gam"]) / np.mean(sets["vanilla"]) < 2 else "no")]
    else:
        steps = sorted({r["step"] for r in rows})
        halfway = steps[(len(steps) - 1) // 2]
        both = {a: np.add(*(sweep.values(rows, k, arm=a, step=steps[-1])
                            for k in ("share_and", "share_or"))) for a in arms}
        logits = {a: [np.mean(sweep.values(rows, f"d_{k}", arm=a, step=halfway))
                      for k in ("real", "and", "or", "three")] for a in arms}
        share, (real, d_and, d_or, three) = both["vanilla"], logits["vanilla"]
        found = [(
            "Figure 3, top", f"samples that are the AND or OR of two images: {names}",
            "they prevail in vanilla", ", ".join(sweep.spread(v, 100) for v in both.values()),
            "holds" if min(share) > 0.5 else "in part" if max(share) > 0.1 else "no"), (
            "Figure 3, top", f"D at step {halfway} on reals, AND, OR, three squares elsewhere: "
            f"{names}", "reals = AND = OR, early, in vanilla",
            "; ".join(", ".join(f"{v:.1f}" for v in d) for d in logits.values()),
            "holds" if min(d_and, d_or) > (real + three) / 2 else "no")]
    return [dict(zip(("paper", "what", "theirs", "ours", "verdict"), claim)) | {
        "ours": f"{claim[3]}, n={n}", "front": claim[1][:6] in ("sample", "celeba") and
        claim[4][:5] != "not d"} for claim in found]


def draw_curves(ax, prefix, seeds, **labels):
    """Scores over training of each kind in SHOWN; of photographs, above those of generated ones."""
    for kind, like in SHOWN.items():
        if (key := prefix + kind) in seeds[0][0]:
            harness.band(ax, [([r["step"] for r in rows], [r[key] - r.get("d_fake", 0)
                         for r in rows]) for rows in seeds], kind, **harness.style(like))
    ax.set(xlabel="updates of G", **labels)
    low, high = ax.get_ylim()                           # with room for the legend above all curves
    ax.set_ylim(low, high + 0.4 * (high - low))
    ax.legend(loc="upper center", ncols=2, handlelength=2)


def strip(axes, columns, pictures):
    """Grids side by side, {title: images (..., C, H, W)}."""
    for ax, (name, x) in zip(axes, pictures.items()):
        ax.imshow(harness.grid(torch.as_tensor(x).flatten(0, -4), columns), interpolation="nearest")
        ax.set(title=name, xticks=[], yticks=[], frame_on=False)


def plot_squares(rows, cfg, folder):
    """By arm: shares of samples, D's scores, the four images and samples -> figure."""
    fig = harness.figure(2.4 * len(cfg["arms"]))
    axes = fig.subplots(len(cfg["arms"]), 3, squeeze=False)
    for arm, (left, middle, right) in zip(cfg["arms"], axes):
        seeds = [[r for r in rows if (r["arm"], r["seed"]) == (arm, s)] for s in cfg["seeds"]]
        draw_curves(left, "share_", seeds, ylabel="share, exact to the pixel", yticks=(0, 0.5, 1),
                    title=f"{arm}: what samples are (n={len(seeds)} seeds)")
        draw_curves(middle, "d_", seeds, ylabel="logit of D",
                    title=f"{arm}: how D scores them and\nthree squares elsewhere")
        lines = []
        for seed in cfg["seeds"]:
            known = x = images_of(Namespace(size=cfg["size"], seed=seed))
            file = folder / f"{arm}-s{seed}" / "samples.npz"
            if file.exists():                           # else result.json came alone
                x = torch.cat([known, torch.as_tensor(np.load(file)["samples"])])[:9]
            frames = torch.full((len(x), 3), 200)
            for image, colour in zip(known, ("009E73", "009E73", "D55E00", "0072B2")):
                frames[geometry.is_in(x, image[None])] = torch.tensor([*bytes.fromhex(colour)])
            lines.append(harness.frame(x, frames))
        title = "A, B, AND, OR; samples framed\nalike; a line a seed"
        strip([right], len(x), {title: torch.cat(lines)})
    return fig


def plot_photos(rows, cfg, folder):
    """Best matches, D's view over training, GAM beside generated images -> figure."""
    arms = cfg["arms"]
    first, gam = rows[0], {r["method"]: r for r in reversed(rows) if r["part"] == "gam"}
    held, *files = (dict(np.load(folder / f"{name}.npz")) for name in (
        "controls", *(f"{a}-s{cfg['seeds'][0]}/samples" for a in arms)))
    near = {f"generated, {a}": np.mean(sweep.values(rows, "nearer_average_fake", arm=a))
            for a in arms} | {"held-out (control)": first["nearer_average_heldout"]}
    sets = {k: held[k] for k in ("held-out", "gam", "random pairs")} | {
        a: file["samples"] for a, file in zip(arms, files)}
    top, middle, bottom = (fig := harness.figure(7)).subfigures(3)
    strip(top.subplots(1, len(near)), 5, {
        f"{k}: {v:.1%}": file["shown"] for (k, v), file in zip(near.items(), [*files, held])})
    top.suptitle(f"Best matches of {cfg['n_query']} images each, and how many of all are nearer to "
                 "an average\nthan to an image. From left: the image; the nearest average, of "
                 f"{first['pairs_searched']:,}; its two images; the nearest image")
    for ax, arm in zip(middle.subplots(1, len(arms), squeeze=False)[0], arms):
        draw_curves(ax, "d_", sweep.values(rows, "curve", arm=arm), title=f"D of {arm} over "
                    f"training (n={len(cfg['seeds'])} seeds)", ylabel="mean D, above generated")
    strip(bottom.subplots(1, len(sets)), 4, {
        "{method}\n{metric} {distance:.3g}\nKID {kid:.2g}".format(**gam[k]): x
        for k, x in sets.items()})
    bottom.suptitle("Held-out photographs, averages of neighbours (gam) and of random pairs, fakes:"
                    f"\n{cfg['n_fid']} each against {gam['gam']['n_real']} training images")
    return fig


def plot(folder):
    """figure.png from the files of a run."""
    result = sweep.read_result(folder, Path(__file__).stem)
    draw = plot_photos if "part" in result["rows"][0] else plot_squares
    harness.save_figure(draw(result["rows"], result["config"], folder), folder)
    return result


def main(argv=None):
    parser = sweep.parser(__doc__, PRESETS, OWN, ARMS)
    parser.set_defaults(dataset="geometry", data_dir=data.DATA_DIR)
    args = sweep.parse(parser, __file__, argv)
    if args.plot:
        return plot(args.plot)
    if args.sample:
        return harness.sample(args)
    squares, args.arms = args.dataset == "geometry", args.arms or list(ARMS)
    presets, run = (PRESETS, run_squares) if squares else (PHOTOS, run_photos)
    if wrong := [k for k in OF_PHOTOS if squares and vars(args)[k] is not None]:
        raise core.UserError(f"--{wrong[0].replace('_', '-')}: not with --dataset geometry")
    size = args.size or data.SIZES.get(args.dataset, 64)
    narrow = {"width": 16} if args.preset == "cpu" and not squares and size > 32 else {}
    cfg = sweep.resolve(args, OWN, COMMON, {"size": size}, presets["paper"], presets[args.preset],
                        narrow, channels=1 if squares else 3)
    runs = [Namespace(**vars(cfg), arm=arm, seed=seed, run=f"{arm}-s{seed}")
            for arm in cfg.arms for seed in cfg.seeds]
    if sweep.announce(runs, args.dry_run, run):
        return {}
    if squares and cfg.size < 16:
        raise core.UserError(f"--size {cfg.size}: must be at least 16 with --dataset geometry")
    if not sweep.worker():      # what is missing or wrong shows here, before any file
        core.check_batch(cfg, 128) if squares else prepare(cfg)
    folder, rows = sweep.train_all(args, f"{Path(args.dataset).stem}-{args.preset}", runs, run)
    rows = rows if squares else controls(cfg, folder, rows)
    sweep.write_result(args, folder, runs, rows, claims(rows) if "vanilla" in cfg.arms else [])
    return plot(folder)


if __name__ == "__main__":
    harness.cli(main)
