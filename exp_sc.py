"""Figures 1, 5 and 7: Sample Correction (SC) and PCR on the two-rectangle GAN, SC on photographs.

Section 5.2: trained on images of exactly two rectangles, a GAN gets almost 80% of its images wrong,
with PCR (ANDs and ORs of training pairs as extra negatives) 30%, with SC (no correct fakes in D's
batch) 3%, with both 1%, and nearly all training images are among 256,000 samples. Section 5.3: on
32 photographs, replacing fakes of a DIF below 0.1 improves FID and DIF "by a large margin".

    python exp_sc.py
    python exp_sc.py --dataset cifar10

Presets: paper (one GPU), cpu (a data set and seed in ten minutes on two cores), smoke (seconds).
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

PAPER = {   # Figure 1: share of correct images, and what the paper says of it
    "vanilla": (0.20, "most are wrong"), "pcr": (0.70, "above vanilla, stuck 10 points under sc"),
    "sc": (0.97, "above 90%"), "sc+pcr": (0.99, "the best arm, and the first at 90%")}
COUNTERS = {"tolerant": geometry.count, "exact": geometry.count_exact}
# UNSPECIFIED: loss, networks, n_dis. WGAN-GP on DCGANs, n_dis 1: neither collapses nor saturates.
COMMON = dict(arch="dcgan", loss="wgan", norm_d="none", init_d="he", gp_weight=10.0, gp_comb=False,
              n_dis=1, steps=50_000, beta2=0.9, width=64, comb_weight=0.5, flip=False, ema_beta=0.0,
              log_every=100)
PRESETS = {
    # Section 5.2, Appendix F. UNSPECIFIED: sizes and step sizes on rectangles. A narrow DCGAN with
    # z of 128, chosen because it shows the paper's anomaly: with one level more (`--base 2`) and a
    # z of 8 most of vanilla's images are right (docs/cures.md). beta1 0, lr_decay: crisp squares.
    "paper": dict(size=32, n_train=25_600, n_cover=256_000, batch=64, lr_g=5e-4, lr_d=5e-4,
                  z_dim=128, beta1=0.0, base=4, width=32, lr_decay=True, n_fid=4096, checks=50,
                  sc_counter="tolerant", r1_weight=10.0),
    # DEVIATION: rectangles on a CPU. Canvas and squares are half as wide; that leaves 1/14 of the
    # possible images, and so many training images and coverage samples. z is chosen so that vanilla
    # is under 60% and SC+PCR over 90; with 128 SC+PCR takes longer.
    "cpu": dict(size=16, n_train=1_800, n_cover=18_000, z_dim=16, batch=32, lr_g=1e-3, lr_d=1e-3,
                steps=8000, n_fid=1024, checks=40),
    "smoke": dict(jobs=1, size=16, n_train=64, n_cover=64, width=8, z_dim=16, batch=16, steps=4,
                  n_fid=32, checks=2, log_every=2)}
PHOTOS = {
    # Section 5.3: Adam(2e-4, .5, .9), "e.g." 32 images and batches of 2, threshold 0.1.
    # UNSPECIFIED: sizes on photographs, and which 32 images. Every seed has the same ones.
    "paper": dict(n_train=32, n_heldout=2048, batch=2, lr_g=2e-4, lr_d=2e-4, beta1=0.5, z_dim=128,
                  base=4, lr_decay=False, n_fid=2048, dims=2048, n_dif=1024, checks=25, spares=3,
                  sc_threshold=0.1, seeds=[0, 1, 2]),
    # DEVIATION: photographs on a CPU. 8 images, because with 32 no fake was under the threshold in
    # 3,500 updates; small nets and images, few large steps, a distance of early Inception features.
    "cpu": dict(size=32, n_train=8, width=24, steps=8000, lr_g=5e-4, lr_d=5e-4, lr_decay=True,
                n_fid=64, dims=64, n_heldout=512, n_dif=256, checks=8, seeds=[0]),
    "smoke": dict(jobs=1, size=32, n_train=8, n_heldout=32, width=8, z_dim=16, steps=4, n_fid=16,
                  dims=64, n_dif=16, checks=2, log_every=2, seeds=[0])}
OF_SQUARES = {"n_cover": (int, 1, 10 ** 9, "samples searched for training images"),
              "sc_counter": (tuple(COUNTERS), "what SC takes for correct"),
              "r1_weight": (float, 0, 10 ** 6, "gamma of arm r1")}
OF_PHOTOS = {"sc_threshold": (float, 0, 1, "SC replaces fakes of a DIF below it"),
             "spares": (int, 1, 1000, "batches of fakes to choose replacements from"),
             "n_heldout": (int, 2, 10 ** 9, "unseen images"), "n_dif": (int, 2, 10 ** 6, "samples"),
             "dims": fid.FLAGS["dims"], "fid_weights": fid.FLAGS["fid_weights"]}
OWN = {"dataset": (str, "geometry (rectangles), cifar10, celeba, imagenet, or a folder or zip of "
                        "images (%(default)s)"), "n_train": (int, 2, 10 ** 9, "training images"),
       "data_dir": data.FLAGS["data_dir"], **OF_SQUARES, **OF_PHOTOS}


def training_set(cfg):
    """Appendix F: n_train images of two rectangles, as many ANDs and ORs of pairs; both uint8."""
    if cfg.size < 16 or cfg.n_train % 2:
        raise core.UserError(f"--size {cfg.size} must be at least 16, --n-train {cfg.n_train} even")
    x, y, x_and, x_or = geometry.draw_pairs(cfg.n_train // 2, cfg.size, cfg.size // 4)
    return torch.cat([x, y]), torch.cat([x_and, x_or])


def combinations(t):
    """A batch of ANDs and ORs of training pairs, from the pool of all."""
    # UNSPECIFIED: how PCR's negatives are drawn. With replacement, half AND and half OR.
    index = torch.randint(len(t.pool), (t.cfg.batch,), generator=t.gen, device=t.device)
    return t.images(index, t.pool)


def sc_weight(t, x_fake):
    """SC: weights (B,) of fakes (B, 1, H, W) in D's loss, 0 for those of exactly two rectangles."""
    # UNSPECIFIED: how strictly to count. The exact counter keeps ragged pairs for D, cures later.
    # UNSPECIFIED: whether correct fakes are replaced (5.1) or, as here, discarded (Section 5.2).
    correct = geometry.has_two(x_fake, t.cfg.size // 4, COUNTERS[t.cfg.sc_counter])
    return core.sample_correction(x_fake, correct.float(), threshold=0.5)[1]


ARMS = {  # each is d_loss(t, x_real, x_fake) -> (loss, {name: tensor})
    "vanilla": core.d_loss, "ema": core.d_loss, "r1": core.r1,
    "pcr": lambda t, x_real, x_fake: core.d_loss(t, x_real, x_fake, combinations(t)),
    "sc": lambda t, x_real, x_fake: core.d_loss(t, x_real, x_fake, weight=sc_weight(t, x_fake)),
    "sc+pcr": lambda t, x_real, x_fake: core.d_loss(
        t, x_real, x_fake, combinations(t), sc_weight(t, x_fake))}
OVERRIDE = {    # of two arms that are not the paper's; R1 is made for the logarithmic loss
    "ema": dict(ema_beta=0.999), "r1": dict(loss="ns", gp_weight=0.0)}


def score(t):
    """Shares of n_fid images: correct by both counters, and with 0, 1, 2, 3, 4 and more; the same
    of G's average, if there is one, which is then the one that is judged."""
    side, row = t.cfg.size // 4, {}
    for suffix, batches in t.fakes(t.cfg.n_fid).items():
        x = torch.cat(list(batches))
        for key, counter in zip(("correct", "correct_exact"), COUNTERS.values()):
            row[key + suffix] = geometry.has_two(x, side, counter).float().mean().item()
        n = geometry.count(x, side)[0].clamp(max=4).bincount(minlength=5)
        row["hist" + suffix] = (n / len(x)).tolist()
    return row | {"wrong": 1 - row["correct" + suffix]}


def coverage(t, images, n_show=30):
    """What n_cover samples are worth, `geometry.report`; mode coverage, Figure 7, is how many of
    n_show training images are among them. -> a dict, and uint8 (n_show, 2, H, W), each of these
    training images beside its nearest sample."""
    shown = images[torch.randperm(len(images), generator=core.generator(0))[:n_show]]
    wanted, nearest = geometry.lit(shown).flatten(1).float(), shown
    least = wanted.new_full([len(shown)], torch.inf)            # pixels apart

    def samples():
        nonlocal nearest, least
        for x in core.generate(t.G, t.latents(t.cfg.n_cover, seed=2)):
            apart, index = torch.cdist(wanted, geometry.lit(x).flatten(1).float(), p=1).min(1)
            nearest = torch.where((apart < least).view(-1, 1, 1, 1), x[index], nearest)
            least = least.minimum(apart)
            yield x

    row = geometry.report(samples(), images, t.cfg.size // 4, n_show)
    return {"n_cover": row.pop("n_samples"), **row, "distinct_train":
            geometry.count_distinct(images)}, torch.cat([shown, nearest], 1)


def to_90(row, column=1):
    """First step of a row's curve with 90% correct, tolerant (column 1) or exact (2), or None."""
    return next((point[0] for point in row["curve"] if point[column] >= 0.9), None)


def run_squares(cfg, folder):
    """Train one arm with one seed, from scratch or from its checkpoint, and score it -> its row."""
    images, pool = (x.to(harness.pick_device(cfg.device)) for x in training_set(cfg))
    t = core.Trainer(cfg, images, *core.build(cfg), d_loss=ARMS[cfg.arm])
    t.pool = pool
    harness.fit(t, folder, score, best="wrong", good=lambda x: geometry.has_two(x, cfg.size // 4))
    scored = [r for r in harness.read_rows(folder / "metrics.jsonl") if "wrong" in r]
    end = "" if t.G_ema is None else "_ema"
    trained, t.G = t.G, t.G_ema or t.G
    (covered, pairs), x, last = coverage(t, images), t.preview(36), scored[-1]
    t.G = trained
    with harness.atomic(folder / "samples.npz") as tmp:
        np.savez(tmp, samples=x.cpu(), pairs=pairs.cpu())
    row = {"arm": cfg.arm, "seed": cfg.seed, "steps": last["step"], "d_steps": last["d_steps"],
           "n": cfg.n_fid, "hist": last["hist" + end], "sc_counter": cfg.sc_counter,
           "curve": [[r["step"], r["correct" + end], r["correct_exact" + end]] for r in scored]}
    return {**row, "to_90": to_90(row), **covered, "update_seconds": harness.update_seconds(t)}


def verdicts(rows, key, column):
    """{arm: whether its words in PAPER hold} by the counter of `key`; own arms: above vanilla."""
    share = {a: sweep.values(rows, key, arm=a) for a in [*PAPER, *(r["arm"] for r in rows)]}
    first = {a: [to_90(r, column) or torch.inf for r in rows if r["arm"] == a] for a in PAPER}
    above = {a: sweep.verdict(share[a], share["vanilla"]) for a in share}
    stuck = sweep.verdict([v + 0.1 for v in share["pcr"]], share["sc"], higher=False)
    best = [word for a in ("vanilla", "pcr", "sc") for word in (
        sweep.verdict(share["sc+pcr"], share[a]), sweep.verdict(first["sc+pcr"], first[a], False))]
    return {**above, "vanilla": sweep.verdict(share["vanilla"], [0.5, 0.5], higher=False),
            "pcr": sweep.all_of(above["pcr"], stuck), "sc": sweep.verdict(share["sc"], [0.9, 0.9]),
            "sc+pcr": sweep.all_of(*best)}


def claims(rows):
    """Figure 1 by both counters and Figure 7, a claim an arm."""
    tolerant, exact, found = verdicts(rows, "correct", 1), verdicts(rows, "correct_exact", 2), []
    for arm in dict.fromkeys(r["arm"] for r in rows):
        mine = [r for r in rows if r["arm"] == arm]
        share, to_pixel, hits, new = (sweep.values(mine, key) for key in (
            "correct", "correct_exact", "coverage_exact", "unseen_share"))
        paper, words = PAPER.get(arm, (None, "above vanilla"))
        by = f" by the {mine[0].get('sc_counter', 'tolerant')} counter" * arm.startswith("sc")
        first = ", ".join(f"{t:,}" if t else "never" for t in map(to_90, mine))
        first = f"at step {first}" if any(map(to_90, mine)) else "never"
        n, total = mine[0]["n_cover"], mine[0]["coverage_n"]
        worth = [r["n_eff"] for r in mine if r.get("n_eff")]
        worth = f", worth {sweep.spread(worth)} different ones" if worth else ""
        found += [
            {"paper": "Figure 1", "what": f"images of two rectangles, {arm}{by}: {words}", "theirs":
             f"{paper:.0%} right" if paper else "", "ours": f"{sweep.spread(share, 100)}, 90% "
             f"{first}; to the pixel {sweep.spread(to_pixel, 100)}; n={len(mine)}",
             "verdict": f"{tolerant[arm]}; to the pixel: {exact[arm]}", "front": True},
            {"paper": "Figure 7", "what": f"training images found exactly in {n:,} samples, {arm}",
             "theirs": "most of 30" if arm in ("pcr", "sc", "sc+pcr") else "",
             "ours": f"{', '.join(map(str, hits))} of {total}; {sweep.spread(new, 100)} of correct "
             f"samples{worth}, are no training image", "front": arm == "sc+pcr",
             "verdict": sweep.verdict(hits, [total / 2] * 2)}]
    return sorted(found, key=lambda claim: claim["paper"])


def show(ax, images, title, columns=None, good=None):
    """A grid of images (N, C, H, W) on an axis, those in red frames that are not `good` (N,)."""
    if good is not None:
        images = harness.frame(images, harness.red(good))
    ax.imshow(harness.grid(images, columns), interpolation="nearest")
    ax.set(title=title, xticks=[], yticks=[], frame_on=False)


def plot_squares(rows, cfg, folder):
    """What each arm draws, share correct over training, modes -> figure."""
    arms, steps = list(dict.fromkeys(r["arm"] for r in rows)), max(r["steps"] for r in rows)
    fig = harness.figure(4.8 + 0.55 * len(arms))
    top, middle, bottom = fig.subfigures(3, height_ratios=[2.1, 2.5, 0.55 * len(arms)])
    top.suptitle(f"Samples after {steps} updates of G; red frame: not exactly two squares")
    ax = middle.subplots()
    for i, arm in enumerate(arms):
        mine, style = [r for r in rows if r["arm"] == arm], harness.style(arm)
        with np.load(folder / f"{arm}-s{mine[0]['seed']}" / "samples.npz") as saved:
            x, pairs = (torch.from_numpy(saved[k]) for k in ("samples", "pairs"))
        show(top.add_subplot(1, len(arms), i + 1), x,
             f"{arm}: {np.mean(sweep.values(mine, 'correct')):.0%} have two",
             good=geometry.has_two(x, cfg["size"] // 4))
        curves = [list(zip(*r["curve"])) for r in mine]
        harness.band(ax, [c[:2] for c in curves], f"{arm} (n={len(mine)})", lw=1.6, **style)
        harness.band(ax, [c[::2] for c in curves], None, lw=0.7, alpha=0.7, **style)
        if arm in PAPER:
            ax.plot(steps, PAPER[arm][0], "<", color=style["color"], ms=5, clip_on=False)
        same = (pairs == pairs[:, :1]).flatten(2).all(2)[:10].flatten()
        show(bottom.add_subplot(len(arms), 1, i + 1), pairs[:10].flatten(0, 1)[:, None],
             "{arm}: training image | nearest of {n_cover:,} samples, red if not equal: "
             "{coverage_exact} of {coverage_n} are".format(**mine[0]), columns=20, good=same)
    ax.set(xlabel="updates of G", ylabel="share of images with two rectangles", ylim=(0, 1.02),
           xlim=(0, steps), title="thick: tolerant counter, thin: to the pixel, triangles: paper")
    ax.legend(loc=(0.01, 0.65), labelspacing=0.2)
    harness.save_film(folder / "film.gif", {
        arm: folder / f"{arm}-s{rows[0]['seed']}" for arm in (arms[0], arms[-1])})
    return fig


def distances(x, y):
    """L2 distances (M, N) of images (M, C, H, W) and (N, C, H, W) in [-1, 1], exact also where
    small, in parts of the largest there can be. DIF is the least one to a training image."""
    # UNSPECIFIED: the normalisation of DIF. By the largest possible distance 0.1 is 26 grey
    # levels, a blurred copy's error; by one of training images hardly a blurred copy is under 0.1.
    apart = torch.cdist(x.flatten(1), y.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
    return apart / (2 * x[0].numel() ** 0.5)


def corrected(t, x_fake, gen=None):
    """SC by DIF: of fakes (B, C, H, W) those under the threshold make way for the spares of largest
    DIF. With a stream `gen` as many make way, but which, and for which spares, is drawn from it."""
    # UNSPECIFIED: what "replaced with less realistic ones" means. By the least realistic of
    # further batches, each drawn by itself, so that batch norm treats all alike.
    x = torch.cat([x_fake, *(t.fake() for _ in range(t.cfg.spares))])
    d, b = distances(x, t.x_train).amin(1), len(x_fake)
    index = torch.arange(len(x), device=x.device)
    keep, _ = core.sample_correction(index, -d, -t.cfg.sc_threshold, b)
    if gen is not None:
        stay, come = (torch.rand(n, generator=gen, device=x.device).argsort()
                      for n in (b, len(x) - b))
        keep = torch.where(index[:b] < (keep >= b).sum(), b + come[:b], stay)
    return x[keep]


PHOTO_ARMS = {  # `random` is a control: as many fakes are replaced, but any
    "vanilla": core.d_loss,
    "sc": lambda t, x_real, x_fake: core.d_loss(t, x_real, corrected(t, x_fake)),
    "random": lambda t, x_real, x_fake: core.d_loss(t, x_real, corrected(t, x_fake, t.gen))}


def measure(x, images, threshold):
    """What samples owe to the training images, both uint8 (., C, H, W): mean DIF; share of copies,
    under the threshold; recall, share of training images nearest to a copy; how many are collapsed,
    no copies but flat or nearly another sample; share of noise, rougher than any training image."""
    x, images = core.to_float(x), core.to_float(images.to(x.device))
    d, nearest = distances(x, images).min(1)
    copy, apart = d < threshold, distances(x, x) + torch.eye(len(x), device=x.device)
    flat = (x - x.mean((2, 3), keepdim=True)).square().flatten(1).mean(1).sqrt() / 2 < 0.02
    rough, known = (v.diff(dim=2).abs().mean((1, 2, 3)) + v.diff(dim=3).abs().mean((1, 2, 3))
                    for v in (x, images))
    return {"dif": d.mean().item(), "copies": copy.float().mean().item(),
            "recall": len(nearest[copy].unique()) / len(images),
            "collapsed": int(((flat | (apart.amin(1) < 0.03)) & ~copy).sum()),
            "noisy": (rough > known.max()).float().mean().item(), "n": len(x)}


def prepare(cfg):
    """Training images, other photographs that pose as samples, the score of samples, what it is."""
    images = data.load(cfg.dataset, cfg.size, cfg.data_dir, "train", cfg.n_train)
    held = data.load(cfg.dataset, cfg.size, cfg.data_dir, "test")
    if len(held) < 4:
        raise core.UserError(f"--dataset {cfg.dataset}: holds out {len(held)}, but 4 are needed")
    held = held[torch.randperm(len(held), generator=core.generator(0))]
    net = fid.load_inception(dims=cfg.dims, weights=cfg.fid_weights, data_dir=cfg.data_dir,
                             device=harness.pick_device(cfg.device))
    ends = [fid.reference(net, v, cfg.data_dir / "cache")[0]
            for v in (images, held[:2 * cfg.n_heldout:2])]

    def score(x):
        stats, _ = fid.features(net, x[:cfg.n_fid].split(fid.BATCH))
        own, other = (fid.frechet_distance(v.mean, v.cov, stats.mean, stats.cov) for v in ends)
        return {"distance": own, "distance_heldout": other, "n_fid": stats.n,
                **measure(x[:cfg.n_dif], images, cfg.sc_threshold)}
    return images, held[1::2], score, {"metric": net.label, "features": net.id, "dims": cfg.dims,
                                       "dataset": cfg.dataset, "n_train": cfg.n_train}


def references(cfg):
    """Rows of what no GAN drew: unseen photographs, a perfect copyist, averages of two, grey."""
    images, unseen, score, protocol = prepare(cfg)
    gen, n = core.generator(0), max(cfg.n_fid, cfg.n_dif)
    i = torch.randint(len(images), (n,), generator=gen)
    j = (i + torch.randint(1, len(images), (n,), generator=gen)) % len(images)
    average = core.to_uint8((core.to_float(images[i]) + core.to_float(images[j])) / 2)
    shown = {"unseen photographs": unseen[:n], "copyist": images[i], "averages of two": average,
             "plain grey": torch.full_like(images[i], 128)}
    return [{"part": "sc_reference", "arm": k, **score(x), **protocol} for k, x in shown.items()]


def run_photos(cfg, folder):
    """Train one arm with one seed, from scratch or from its checkpoint -> its rows, one a score."""
    images, _, score, protocol = prepare(cfg)
    t = core.Trainer(cfg, images.to(harness.pick_device(cfg.device)), *core.build(cfg),
                     d_loss=PHOTO_ARMS[cfg.arm])
    t.x_train, n = core.to_float(t.data), max(cfg.n_fid, cfg.n_dif)
    harness.fit(t, folder, lambda t: score(torch.cat(list(t.fakes(n)[""]))), protocol=protocol)
    x = t.preview(24)
    nearest = distances(core.to_float(x), t.x_train).argmin(1).cpu()
    with harness.atomic(folder / "samples.npz") as tmp:
        np.savez(tmp, samples=x.cpu(), nearest=images[nearest])
    return [{"part": "sc_natural", "arm": cfg.arm, "seed": cfg.seed, **r, **protocol}
            for r in harness.read_rows(folder / "metrics.jsonl") if "distance" in r]


def claims_photos(rows):
    """Figure 5 at the end of training: distance and DIF, beside vanilla and the control."""
    last, name, found = rows[-1], Path(rows[-1]["dataset"]).stem, []
    for key, what in (("distance", last["metric"]), ("dif", "DIF")):
        ends = {r["arm"]: sweep.values(rows, key, arm=r["arm"], step=last["step"]) for r in rows}
        found.append({
            "paper": "Figure 5", "what": f"{name}, {last['n_train']} images: sc lowers the {what} "
            f"of {', '.join(ends)}", "theirs": "by a large margin",
            "verdict": sweep.beside(ends, "sc"), "front": (key, name) == ("distance", "celeba"),
            "ours": f"{', '.join(map(sweep.spread, ends.values()))}; n={len(ends[last['arm']])}"})
    return found


def plot_photos(rows, cfg, folder):
    """Samples of each arm above their nearest training images, and the curves -> figure."""
    fixed = [f"{r['arm']} {r['distance']:.3g}, {r['dif']:.2f}" for r in rows if "seed" not in r]
    rows = [r for r in rows if "seed" in r]
    arms, first = list(dict.fromkeys(r["arm"] for r in rows)), rows[0]
    panels = {"distance": f"{first['metric']} to the training images",
              "distance_heldout": f"{first['metric']} to held-out images",
              "dif": f"mean DIF (SC replaces under {cfg['sc_threshold']:g})"}
    fig = harness.figure(4.6)
    top, bottom = fig.subfigures(2, height_ratios=[1, 1.5])
    top.suptitle(f"Batches of {cfg['batch']}: samples, under each its nearest training image")
    for arm, ax in zip(arms, np.atleast_1d(top.subplots(1, len(arms)))):
        with np.load(folder / f"{arm}-s{first['seed']}" / "samples.npz") as saved:
            pairs = torch.stack([torch.from_numpy(saved[k]) for k in ("samples", "nearest")])
        show(ax, pairs.unflatten(1, (-1, 8)).transpose(0, 1).flatten(0, 2), arm, columns=8)
    for ax, (key, label) in zip(bottom.subplots(1, len(panels)), panels.items()):
        for arm in arms:
            runs = [[sweep.values(rows, k, arm=arm, seed=seed) for k in ("step", key)]
                    for seed in cfg["seeds"]]
            harness.band(ax, runs, arm, **harness.style(arm))
        ax.set(xlabel="updates of G", ylabel=label, xlim=(0, None), ylim=(0, None))
    ax.legend()
    fig.suptitle(f"{Path(first['dataset']).stem}, n={len(cfg['seeds'])}. {first['metric']} and DIF "
                 f"reward memorising; of what no GAN drew:\n{'; '.join(fixed)}")
    return fig


def plot(folder):
    """figure.png from the files."""
    result = sweep.read_result(folder, Path(__file__).stem)
    draw = plot_squares if "curve" in result["rows"][0] else plot_photos
    harness.save_figure(draw(result["rows"], result["config"], folder), folder)
    return result


def main(argv=None):
    p = sweep.parser(__doc__, PRESETS, OWN, ARMS | PHOTO_ARMS)
    p.set_defaults(dataset="geometry", data_dir=data.DATA_DIR)
    args = sweep.parse(p, __file__, argv)
    if args.plot:
        return plot(args.plot)
    if args.sample:
        return harness.sample(args)
    squares = args.dataset == "geometry"
    presets, arms, others, run = ((PRESETS, ARMS, OF_PHOTOS, run_squares) if squares else
                                  (PHOTOS, PHOTO_ARMS, OF_SQUARES, run_photos))
    args.arms = args.arms or [arm for arm in arms if arm not in OVERRIDE]
    wrong = [f"--{key.replace('_', '-')}" for key in others if getattr(args, key) is not None]
    for flag in wrong + [f"--arms {arm}" for arm in args.arms if arm not in arms]:
        raise core.UserError(f"{flag}: not with --dataset {args.dataset} (arms {', '.join(arms)})")
    cfg = sweep.resolve(args, OWN, COMMON, {"size": data.SIZES.get(args.dataset, 64)},
                        presets["paper"], presets[args.preset], channels=1 if squares else 3)
    runs = [Namespace(**vars(cfg) | OVERRIDE.get(arm, {}), arm=arm, seed=seed, run=f"{arm}-s{seed}")
            for seed in cfg.seeds for arm in cfg.arms]
    if sweep.announce(runs, args.dry_run, run):
        return {}
    if not sweep.worker():      # what is missing or wrong shows here, before any file
        core.check_batch(cfg, len((training_set if squares else prepare)(cfg)[0]))
    folder, rows = sweep.train_all(args, f"{Path(args.dataset).stem}-{args.preset}", runs, run)
    sweep.write_result(args, folder, runs, rows if squares else references(cfg) + rows,
                       (claims if squares else claims_photos)(rows))
    return plot(folder)


if __name__ == "__main__":
    harness.cli(main)
