"""Topology of latents (Jin et al. 2024): must a GAN draw wrong images where the data has a hole?

G pushes its latents' law forward by a continuous map. Were all images of a loop that does not
shrink G's, of latents that depend continuously on them, a Gaussian's latents would fill the loop
in, and G draw the filling: wrong images. The paper has spheres and tori; here a set is all images
of squares in some places (neighbours.squares), its topology known, its images counted exactly.

    python -m neighbours.topology --dataset all --seeds 0 1 2    # without --dataset: disc and torus

Arms: a GAN with Gaussian z of 2 or 8 entries; with a z of the data's own shape, of angles, pieces
and uniforms (manifold), or of another set's (wrong-manifold: torus' for disc, halves' for free, and
the other way round, disc's for apart); for reference charts, an autoencoder with K charts
(Schonsheck, Chen, Lai 2019), and diffusion (Ho et al. 2020), a deterministic map of noise.
Predicted before any run, of wrong images: of Gaussian z apart > torus, free > disc, halves, the
last gap perhaps small; manifold cures apart and torus; a wrong manifold hurts disc and halves.
Verdict, three seeds: holes are not what counts. Of Gaussian z apart, in two pieces, has fewer wrong
images than disc, without a hole. manifold helps torus a little (29% wrong, not 36%), apart not, and
a wrong one hurts neither disc nor halves. Around a hole the worst edge is no worse than elsewhere.
Presets: paper (one GPU), cpu (the GANs on disc and torus: nine minutes a seed on a core), smoke.
"""
import itertools
import math
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import core
import harness
import neighbours
import sweep

# UNSPECIFIED: images, networks, how long.
COMMON = neighbours.COMMON | dict(charts=4, held=0.5)
PRESETS = {"paper": {}, "smoke": {}, "cpu": dict(
    steps=3000, width=16, lr_g=2e-3, lr_d=2e-3, checks=4, n_fid=512, n_end=4096)}
GROUPS = {k: [k] for k in (*neighbours.SETS, "geometry")} | {
    "pair": ["disc", "torus"], "all": [*neighbours.SETS]}
OWN = neighbours.OWN | {
    "dataset": ((*GROUPS,), "(%(default)s: disc and torus)"),
    "charts": (int, 2, 1000, "K, of the chart autoencoder"),
    "held": (float, 0, 0.9, "share of the images that is not trained on, to count copies")}
# Of how many pieces, circles and intervals a set's shape is made, and whose shape is the wrong one.
LAWS = {"disc": (0, 0, 2), "torus": (0, 2, 0), "free": (0, 1, 3), "halves": (0, 0, 4),
        "apart": (2, 0, 2)}
LAWS["geometry"] = LAWS["free"]
WRONG = {"disc": "torus", "torus": "disc", "free": "halves", "halves": "free", "apart": "disc",
         "geometry": "halves"}
HOLES = {"apart": 2, "torus": 1, "free": 1, "geometry": 1, "disc": 0, "halves": 0}  # as predicted
GAUSSIAN = {"gaussian-2": 2, "gaussian-8": 8}
ARMS = (*GAUSSIAN, "manifold", "wrong-manifold", "charts", "diffusion")
NEAR, SHOWN, SEAMS = 2, 8, 32   # wrong pixels a square may have; images of an edge; walks


class Law(nn.Module):
    """Normals z (B, z_dim) -> latents (B, n_out): the first picks a piece, in one-hot code, others
    become (cos, sin) of angles, then uniforms on [-1, 1], then normals. First layer of a G, so that
    who draws from it, to score or to look, draws its law."""

    def __init__(self, pieces=0, circles=0, uniforms=0, normals=0, radius=None):
        super().__init__()
        self.register_buffer("share", torch.full((pieces,), 1 / max(pieces, 1)))
        self.takes, self.radius = (min(pieces, 1), circles, uniforms, normals), radius
        self.gives = pieces, circles, circles, uniforms, normals
        self.z_dim, self.n_out = sum(self.takes), sum(self.gives)

    def forward(self, z):
        pick, turn, level, rest = z.split(self.takes, 1)
        pick, turn, level = (torch.special.ndtr(v) for v in (pick, turn, level))
        piece = (pick > self.share.cumsum(0)[:-1]).sum(1, keepdim=True)
        piece = piece == torch.arange(len(self.share), device=z.device)
        turn = 2 * math.pi * turn
        return torch.cat([piece.float(), turn.cos(), turn.sin(), 2 * level - 1, rest], 1)

    def project(self, c):
        """The latents nearest to any (B, n_out), normals at a length of `radius`, if any."""
        piece, cos, sin, level, rest = c.split(self.gives, 1)
        length = torch.hypot(cos, sin).clamp(min=1e-6)
        rest = F.normalize(rest) * self.radius if self.radius else rest
        piece = F.one_hot(piece.argmax(1), len(self.share)).float() if len(self.share) else piece
        return torch.cat([piece, cos / length, sin / length, level.clamp(-1, 1), rest], 1)


class Denoiser(nn.Module):
    """Noise (B, HW) <-> images (B, 1, H, W) in 33 deterministic steps of 100 levels (Song et al.
    2021, DDIM). `keep` is the image's share of a level's variance, seen as two more channels."""

    def __init__(self, width):
        super().__init__()
        # UNSPECIFIED: the levels, ten times as steep as Ho's, and the network, on 4 x 4 blocks.
        self.register_buffer("keep", (1 - torch.linspace(1e-3, 0.2, 100)).cumprod(0))
        self.net = nn.Sequential(nn.PixelUnshuffle(4), *(layer for n in (48, width, width) for layer
                                 in (nn.Conv2d(n, width, 3, 1, 1), nn.GroupNorm(1, width),
                                     nn.SiLU())), nn.Conv2d(width, 16, 1), nn.PixelShuffle(4))

    def image(self, x, keep):
        """The image in x (B, 1, H, W), its share of the variance being keep (B or 1, 1, 1, 1)."""
        level = torch.cat([keep.sqrt(), (1 - keep).sqrt()], 1).expand(len(x), 2, *x.shape[2:])
        return self.net(torch.cat([x, level], 1))

    def walk(self, x, back=False):
        levels = self.keep.flip(0)[::3]
        for a, b in itertools.pairwise(levels.flip(0) if back else levels):
            image = self.image(x, a.view(1, 1, 1, 1)).clamp(-1, 1)
            x = b.sqrt() * image + ((1 - b) / (1 - a)).sqrt() * (x - a.sqrt() * image)
        return x

    def forward(self, z):
        return self.walk(z.unflatten(1, (1, math.isqrt(z.shape[1]), -1)))


def image_loss(t):
    """Mean squared error of the images found in noisy ones, of a random level each."""
    # DEVIATION: not of the noise (Ho et al., eq. 14), from which images were learned later.
    x, body = t.real(), t.G[1]
    noise = torch.randn(x.shape, generator=t.gen, device=t.device)
    level = torch.randint(len(body.keep), (len(x),), generator=t.gen, device=t.device)
    keep = body.keep[level].view(-1, 1, 1, 1)
    return F.mse_loss(body.image(keep.sqrt() * x + (1 - keep).sqrt() * noise, keep), x), {}


def read_charts(t, x):
    """Of images: log p of K charts (B, K), latents in each (B, K, n_out)."""
    e = t.extra["E"](x).unflatten(1, (t.cfg.charts, -1))
    chart = torch.eye(t.cfg.charts, device=x.device).expand(len(x), -1, -1)
    return e[:, :, 0].log_softmax(1), torch.cat([chart, e[:, :, 1:].tanh()], 2)


def chart_loss(t):
    """Errors weighed by q = softmax(-error / 0.05 - ln share), and the cross-entropy of p to q."""
    # DEVIATION: by the best error alone one chart had all images. One decoder, charts are an input.
    x = t.real()
    log_p, codes = read_charts(t, x)
    y = t.G[1](codes.flatten(0, 1)).unflatten(0, log_p.shape)
    error = (y - x[:, None]).square().mean((2, 3, 4))
    with torch.no_grad():       # how often a chart will be drawn
        t.G[0].share.lerp_(log_p.exp().mean(0), 0.01)
    q = (-error.detach() / 0.05 - t.G[0].share.log()).softmax(1)
    return (q * (error - log_p)).sum(1).mean(), {}


def gan_loss(t):
    """G's loss of eq. (1), and E's, the mean squared error of latents found in G's images."""
    z = t.latent(t.cfg.batch)
    x = t.G(z)
    missed = F.mse_loss(t.extra["E"](x.detach()), t.G[0](z))
    return core.LOSSES[t.cfg.loss][2](t.D(x)).mean() + missed, {"missed": missed}


def networks(cfg):
    """G, a law and what draws from its latents; D; E, images -> latents, of charts also log p."""
    own = LAWS[WRONG[cfg.dataset] if cfg.arm == "wrong-manifold" else cfg.dataset]
    law = (Law(cfg.charts, 0, sum(own[1:])) if cfg.arm == "charts" else
           Law(normals=cfg.size ** 2, radius=cfg.size) if cfg.arm == "diffusion" else
           Law(normals=GAUSSIAN[cfg.arm]) if cfg.arm in GAUSSIAN else Law(*own))
    G, D = neighbours.pair(Namespace(**vars(cfg) | {"z_dim": law.n_out}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        n = cfg.charts * law.z_dim if cfg.arm == "charts" else law.n_out
        E = neighbours.pair(cfg)[1][:-2].append(core.init(nn.Linear(D[-2].in_features, n), "he"))
        G = Denoiser(8 * cfg.width) if cfg.arm == "diffusion" else G
    return nn.Sequential(law, G), D, E


def make_trainer(cfg, x):
    x, (G, D, E) = x.to(harness.pick_device(cfg.device)), networks(cfg)
    own = core.adam(E.to(x.device).parameters(), cfg.lr_g, (cfg.beta1, cfg.beta2))
    alone = {"charts": chart_loss, "diffusion": image_loss}
    t = core.Trainer(cfg, x, G, D, g_loss=alone.get(cfg.arm, gan_loss),
                     extra=None if cfg.arm == "diffusion" else {"E": (E, own)})
    if cfg.arm in alone:        # there is no adversary to be trained
        t.d_update = lambda: {"d_loss": torch.zeros((), device=t.device)}
    return t


def moved(kind, a, b, size=16):
    """Pixels, down and across, from squares at corners a (..., k, 2) to those at b, well paired."""
    d = (a[..., None, :] - b[..., None, :, :]).abs()
    d = (torch.minimum(d, size - d) if kind == "torus" else d).sum(-1)
    return torch.minimum(*(v.diagonal(dim1=-2, dim2=-1).sum(-1) for v in (d, d.flip(-1))))


def loops(kind, size=16):
    """Corners (L, k, 2) of images a step apart, the first after the last. `loop` cannot shrink:
    around the torus; two squares trade places; over apart's gap and back, one dimension less; other
    sets have none. `control`, as long, goes around a block of places."""
    def around(h, w):       # a block of h x w steps
        s = torch.arange(2 * (h + w))
        return torch.stack([torch.minimum(s, 2 * h + w - s).clamp(0, h), torch.minimum(
            s - h, 2 * (h + w) - s).clamp(0, w)], 1)[:, None]
    side, found = size // 4, {}
    if kind in ("free", "geometry"):        # half of a block
        e = (around(side + 2, side + 2) - side // 2 - 1)[:2 * side + 4]
        found["loop"] = 3 * side // 2 + torch.cat([e, -e], 1)
    elif kind != "disc" and kind != "halves":
        columns = range(size) if kind == "torus" else (
            *range(side), *range(2 * side + 1, 3 * side + 1))
        found["loop"] = torch.tensor([[[side, column]] for column in columns])
    n = len(found.get("loop", range(size)))
    control = around(n // 2 + 1 - side, side - 1) + torch.tensor([side, 0])
    fixed = torch.full((n, neighbours.squares(kind, size)[1].shape[1] - 1, 2), 3 * side)
    return found | {"control": torch.cat([control, fixed], 1)}


@torch.no_grad()
def find_ends(t, x):
    """Latents (L, 2, n_out) of each of the images x (L, 1, H, W) and of the next one, of the first
    after the last; of charts both in the chart that suits both."""
    if t.cfg.arm == "charts":
        log_p, codes = read_charts(t, x)
        best, row = (log_p + log_p.roll(-1, 0)).argmax(1), torch.arange(len(x), device=x.device)
        return torch.stack([c[row, best] for c in (codes, codes.roll(-1, 0))], 1)
    c = t.G[1].walk(x, back=True).flatten(1) if t.cfg.arm == "diffusion" else t.extra["E"](x)
    return torch.stack([t.G[0].project(c), t.G[0].project(c).roll(-1, 0)], 1)


def loop_test(ends, decode, judge, path):
    """From latents `ends` (L, 2, K) of the edges of a loop of images, whose numbers are path (L,):
    decode(latents) -> images, SHOWN of an edge, judge(images) -> (numbers, which are correct):
    worst, wrong: shares of wrong images on the worst edge, on all; tear: longest edge over median;
    found: share of the loop's images that come back. And the worst edge's images."""
    w = torch.linspace(0, 1, SHOWN, device=ends.device).view(1, -1, 1)
    x = decode(torch.lerp(ends[:, :1], ends[:, 1:], w).flatten(0, 1))
    index, right = (v.view(-1, SHOWN).cpu() for v in judge(x))
    wrong, length = 1 - right.float().mean(1), (ends[:, 1] - ends[:, 0]).norm(dim=1)
    worst, found = wrong.argmax().item(), right[:, 0] & (index[:, 0] == path)
    return {"worst": wrong[worst].item(), "wrong": wrong.mean().item(),
            "tear": (length.max() / length.median().clamp(min=1e-6)).item(),
            "found": found.float().mean().item()}, x.unflatten(0, (-1, SHOWN))[worst].cpu()


def seam_test(draw, z, judge, gen, steps=16, reach=2):
    """From each z (n, Z) of a wrong sample both ways along a random direction, normal like z, until
    draw(z) is correct: numbers of these two images (n, 2), -1 for none within `reach` of it."""
    way = torch.randn(z.shape, generator=gen, device=z.device)
    ends = torch.full((len(z), 2), -1, device=z.device)
    for step, (end, sign) in itertools.product(range(1, steps + 1), enumerate((-1, 1))):
        index, right = judge(draw(z + sign * reach * step / steps * way))
        ends[:, end] = torch.where((ends[:, end] < 0) & right, index, ends[:, end])
    return ends.cpu()


def run(cfg, folder):
    """Train one arm with one seed, from scratch or from its checkpoint, and score it -> its row."""
    x, score, protocol = neighbours.prepare(cfg)
    t, kind, saved = make_trainer(cfg, x), cfg.dataset, {}
    ended = neighbours.fit(t, folder, score, protocol)
    images, at = neighbours.squares(kind, cfg.size)

    def judge(x):       # the nearest of all images of the set, and whether it is near
        apart, index = neighbours.nearest(x, images)
        return index, apart <= NEAR * at.shape[1]

    def draw(z, net=t.G):
        return torch.cat(list(core.generate(net, z)))
    z = t.latents(cfg.n_end)
    row = score(x := draw(z))
    for name, path in loops(kind, cfg.size).items():
        path = moved(kind, path[:, None], at, cfg.size).argmin(1)
        found, saved[name] = loop_test(find_ends(t, core.to_float(images[path].to(t.device))), (
            lambda c: draw(t.G[0].project(c), t.G[1])), judge, path)
        row |= {f"{name}_{k}": v for k, v in found.items()}
    wrong = (~judge(x)[1]).nonzero()[:SEAMS, 0]
    seams = seam_test(draw, z[wrong], judge, core.generator(cfg.seed, t.device))
    seams = seams[(seams >= 0).all(1)]
    if len(far := moved(kind, *at[seams].unbind(1), cfg.size).double()):
        row |= {"seam": far.median(), "seam_far": (far > cfg.size // 4).double().mean()}
    with harness.atomic(folder / "samples.npz") as tmp:
        np.savez(tmp, wrong=x[wrong].cpu(), seams=seams, **saved)
    return {"dataset": kind, "arm": cfg.arm, "seed": cfg.seed, "steps": t.step, **protocol, **row,
            "wrong": 1 - row["correct"], "walks": len(wrong), "seams": len(seams), **ended,
            "n_weights": sum(p.numel() for p in t.G.parameters()), "share": t.G[0].share.tolist(),
            "update_seconds": harness.update_seconds(t)}


def claims(rows):
    """What was predicted of the sets and arms that are there, and what was measured of each set."""
    found, kinds = [], [kind for kind in HOLES if any(r["dataset"] == kind for r in rows)]

    def of(key, kind, arm):
        return [r[key] for r in rows if key in r and (r["dataset"], r["arm"]) == (kind, arm)]

    def say(what, theirs, numbers, pairs=(), unit=100):     # the first of a pair is to be more
        said = [sweep.verdict(a, b) for a, b in pairs if a and b]
        if ours := [f"{name} {sweep.spread(v, unit)}" for name, v in numbers.items() if v]:
            found.append({"paper": "Topology", "what": what, "theirs": theirs, "ours": ", ".join(
                ours), "verdict": sweep.all_of(*said) if said else "", "front": False})
    for arm in GAUSSIAN:
        wrong = {kind: of("wrong", kind, arm) for kind in kinds}
        say(f"wrong images of {arm}", "apart > torus, free > disc, halves", wrong, [
            (wrong[a], wrong[b]) for a in kinds for b in kinds if HOLES[a] > HOLES[b]])
    for kind in kinds:
        wrong, exact, loop, control, seam = ({arm: of(key, kind, arm) for arm in ARMS} for key in (
            "wrong", "correct_exact", "loop_worst", "control_worst", "seam"))
        theirs, more = (("manifold cures", GAUSSIAN) if kind in ("apart", "torus") else
                        ("", []) if HOLES[kind] else ("a wrong manifold hurts", ["wrong-manifold"]))
        say(f"{kind}: wrong images", theirs, wrong, [(wrong[a], wrong["manifold"]) for a in more])
        charts = [(exact[a], exact[b]) for a in ARMS[4:] if exact[a] for b in GAUSSIAN]
        say(f"{kind}: exactly correct images", "charts, diffusion > Gaussian z" * bool(
            charts and HOLES[kind]), exact, charts * (HOLES[kind] > 0))
        say(f"{kind}: wrong images on the worst edge around the hole", "Gaussian z: more than "
            "around no hole", loop, [(loop[arm], control[arm]) for arm in GAUSSIAN])
        say(f"{kind}: pixels that squares move across a wrong image", "", seam, unit=1)
    return found


def plot(folder):
    """figure.png from the files: of each set its places, its loops, and in red the ends of walks
    across wrong images; of each arm images of the worst edge, wrong samples, how many are wrong."""
    rows = (result := sweep.read_result(folder, Path(__file__).stem))["rows"]
    kinds, size = list(dict.fromkeys(r["dataset"] for r in rows)), result["config"]["size"]
    fig = harness.figure(0.5 + len(kinds) * (0.25 + 0.26 * len({r["arm"] for r in rows})))

    def plane(at):      # columns and rows (..., 2) of one square, or of one from the other
        return (at[..., 0, :] - at[..., 1, :] if at.shape[-2] == 2 else at[..., 0, :]).flip(-1)
    for kind, (where, strip, share) in zip(kinds, fig.subplots(
            len(kinds), 3, squeeze=False, width_ratios=[1, 2.4, 1])):
        mine = [r for r in rows if r["dataset"] == kind]
        arms, at = list(dict.fromkeys(r["arm"] for r in mine)), neighbours.squares(kind, size)[1]
        nameless = kind in ("free", "geometry")
        every = torch.cat([at, at.flip(1)]) if nameless else at
        where.scatter(*plane(every).T, 3, "0.8", lw=0)
        for name, path in loops(kind, size).items():
            where.plot(*plane(path).T, ".-", c={"loop": "C1", "control": "C2"}[name])
        x = np.full((len(arms), 2 * SHOWN, 1, size, size), 255, np.uint8)
        for i, arm in reversed([*enumerate(arms)]):     # at its end a, b are the first one's
            with np.load(folder / f"{kind}-{arm}-s{mine[0]['seed']}" / "samples.npz") as saved:
                x[i, :SHOWN] = saved["loop" if "loop" in saved else "control"]
                x[i, SHOWN:][:len(saved["wrong"])] = saved["wrong"][:SHOWN]
                a, b = plane(at[torch.from_numpy(saved["seams"])]).unbind(1)
        if kind == "torus":
            b = a + (b - a + size // 2) % size - size // 2
        if nameless:
            b = torch.where(((a + b).abs().sum(1) < (a - b).abs().sum(1))[:, None], -b, b)
        where.plot(*torch.stack([a, b]).permute(2, 0, 1), c="red", lw=0.5)
        strip.imshow(harness.grid(x.reshape(-1, 1, size, size), 2 * SHOWN), aspect="auto")
        strip.axvline(SHOWN * (size + 1) - 1, color="white", lw=4)
        strip.set(xticks=[], yticks=(size + 1) * (np.arange(len(arms)) + 0.5), yticklabels=arms,
                  title="worst edge of loop (else of control), wrong samples")
        for key, mark in (("wrong", "o"), ("loop_worst", "x"), ("control_worst", "+")):
            share.scatter([100 * r.get(key, np.nan) for r in mine], [
                arms.index(r["arm"]) for r in mine], 20, marker=mark, label=key.replace("_", ": "))
        share.set(yticks=[], ylim=(len(arms) - 0.5, -0.5), xlim=(-5, 105), title="wrong images, %")
        where.set(xticks=[], yticks=[], aspect=1, title=f"{kind}, {arms[0]}"), where.invert_yaxis()
    fig.legend(*share.get_legend_handles_labels(), loc="outside lower right", ncols=3)
    harness.save_figure(fig, folder)
    return result


def configure(args):
    """A configuration for each run; the size of latents is that of their law."""
    args.arms, args.seeds = args.arms or list(ARMS), args.seeds or [0]
    if args.z_dim:
        raise core.UserError("--z-dim follows from --arms")
    presets = neighbours.PRESETS[GROUPS[args.dataset][0]]
    cfg = sweep.resolve(args, OWN, COMMON, presets["paper"], presets[args.preset],
                        PRESETS[args.preset], z_dim=1, channels=1)
    runs = [Namespace(**vars(cfg) | {"dataset": kind}, arm=arm, seed=seed,
                      run=f"{kind}-{arm}-s{seed}")
            for seed in cfg.seeds for kind in GROUPS[args.dataset] for arm in cfg.arms]
    for run in runs:
        run.z_dim = networks(run)[0][0].z_dim
    return runs


def main(argv=None):
    p = sweep.parser(__doc__, PRESETS, OWN, ARMS)
    p.set_defaults(dataset="pair")
    args = sweep.parse(p, __file__, argv)
    if args.plot:
        return plot(args.plot)
    if args.sample:
        return harness.sample(args, networks)
    if sweep.announce(runs := configure(args), args.dry_run, run):
        return {}
    for cfg in [] if sweep.worker() else runs:      # what is wrong shows here, before any file
        core.check_batch(cfg, len(neighbours.training(cfg)))
    folder, rows = sweep.train_all(args, f"{args.dataset}-{args.preset}", runs, run)
    sweep.write_result(args, folder, runs, rows, claims(rows))
    return plot(folder)


if __name__ == "__main__":
    harness.cli(main)
