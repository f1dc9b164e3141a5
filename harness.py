"""The plumbing of one run: commands and files, checkpoints, the training loop, figures' style.

A run leaves `config.json`, `metrics.jsonl`, `samples/*.png` and `ckpt.pt` in its folder. Every
file appears whole or not at all.
"""
import argparse
import contextlib
import hashlib
import io
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
import timeit
import zipfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import core
from core import UserError

# ------------------------------------------------------------------------------- commands and files


def cli(main):
    """Run `main()` as a command: a user's mistake or a full disk is one line and exit code 2."""
    if hasattr(sys.stdout, "reconfigure"):  # names of files may be no Unicode
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except (UserError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        text = (str(error) or "not enough memory").replace("\n", "\\n")
        print(f"{Path(sys.argv[0]).name}: error: {text}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


UNUSABLE = {    # what PyTorch says of a GPU -> what it means
    "compiled with CUDA": "this PyTorch is built without CUDA",
    "no NVIDIA driver": "this machine has no NVIDIA driver",
    "driver on your system is too old": "the NVIDIA driver is too old for this PyTorch",
    "invalid device ordinal": "there is no GPU of that number",
    "out of memory": "its memory is full",
    "busy or unavailable": "another process has it to itself (exclusive mode)",
}


def pick_device(name):
    """torch.device from `auto`, `cpu`, `cuda`, `cuda:1`; UserError says why it cannot be used.

    Of several processes on a machine each takes a GPU of its own, by torchrun's or Slurm's number.
    """
    local = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)
    try:
        device = torch.device(name if name != "auto" else
                              "cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", local % max(torch.cuda.device_count(), 1))
        torch.zeros(1, device=device).item()  # `meta` has no numbers
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = next((why for said, why in UNUSABLE.items() if said in str(error)),
                      (str(error) or type(error).__name__).splitlines()[0])
        raise UserError(f"--device {name} cannot be used ({reason}); try --device cpu") from None
    return device


def to_jsonable(value):
    """`value` as JSON gives it back: tensors as lists, namespaces as dicts, paths as strings."""
    def convert(v):
        return (v.tolist() if isinstance(v, (torch.Tensor, np.ndarray, np.generic)) else
                vars(v) if isinstance(v, argparse.Namespace) else str(v))
    return json.loads(json.dumps(value, default=convert))


@contextlib.contextmanager
def atomic(path):
    """Yield a temporary path beside `path`; rename it there once the block ends without error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield tmp
        with open(tmp, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def write_json(path, value):
    with atomic(path) as tmp:
        tmp.write_text(json.dumps(to_jsonable(value), indent=1) + "\n")


def read_json(path):
    """The object in a .json file; None if there is no such file, or no JSON in it."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return json.loads(path.read_text())


def read_rows(path):
    """The rows of a metrics.jsonl, a torn last line left out; [] if there is none."""
    rows = []
    if path.exists():
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
    return rows


def digest(x):
    """The first half of the SHA-256 of a tensor's bytes, in hexadecimal digits."""
    return hashlib.sha256(x.cpu().contiguous().numpy()).hexdigest()[:32]


def cores():
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def chip(device):
    """The name of a device: of the GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError, IndexError):
        return re.findall("model name.*: (.*)", Path("/proc/cpuinfo").read_text())[0]
    return platform.processor() or platform.machine()


def versions():
    """Commit of the code (`-dirty` if changed, None outside a checkout), versions it runs on."""
    commit = None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=Path(__file__).parent,
            text=True, check=True, capture_output=True, timeout=10).stdout.strip()
    return {"git": commit, "python": platform.python_version(), "torch": torch.__version__,
            "numpy": np.__version__}


# ---------------------------------------------------------------------------------------- one run


# Settings that say where and how fast a run goes on, not what comes out.
FREE_TO_CHANGE = {"resume", "jobs", "seeds", "arms", "outdir", "name", "device", "data_dir",
                  "fid_weights", "run"}


def differences(old, new):
    """How two configurations differ so that a run of one cannot go on as the other, in words.

    What only one of them knows does not count: flags come and go between versions.
    """
    old = {"precision": "fp32"} | old if old else {}
    return "; ".join(f"{k} was {old[k]}, is {v}" for k, v in sorted(to_jsonable(new).items())
                     if k not in FREE_TO_CHANGE and k in old and old[k] != v)


def read_config(folder, cfg, protocol=None):
    """The config.json of a run folder, without one as good as empty; UserError if not `cfg`'s."""
    path = folder / "config.json"
    old = read_json(path) if path.exists() else {"flags": {}}
    if not isinstance(old, dict) or not isinstance(old.get("flags"), dict):
        raise UserError(f"{path} is damaged: choose another --name")
    if differ := (differences(old["flags"], vars(cfg)) or
                  differences(old.get("protocol", {}), protocol or {})):
        raise UserError(f"{folder} was made with another configuration, so choose another "
                        f"--name: {differ}")
    return old


@contextlib.contextmanager
def stop_signals():
    """Yield a list that SIGINT and SIGTERM are put into; the third of a kind stops at once.

    Not the second: a process of a group may get one from the group's sender and one from its
    parent.
    """
    caught = []

    def handle(number, frame):
        if caught.count(number) > 1:
            sys.exit(128 + number)
        caught.append(number)

    old = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def read_checkpoint(path):
    """The dict of a ckpt.pt, opened without running code; UserError if it is none or damaged."""
    try:
        with zipfile.ZipFile(path) as z:                # torch.load does not look at the checksums
            if bad := z.testzip():
                raise ValueError(f"{bad} is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
        state["G"], state["config"].items()
        return state
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except Exception as error:  # torch raises nearly anything on a broken file
        raise UserError(f"{path} is no checkpoint of this project ({type(error).__name__})") \
            from None


def sample(args, networks=core.build, prior=core.normal_prior):
    """Draw args.n images from the checkpoint args.sample into the picture args.out."""
    from PIL import Image
    if not 1 <= args.n <= 10 ** 5 or args.out.suffix.lower() not in Image.registered_extensions():
        raise UserError(f"--n {args.n} --out {args.out}: need an image at least, and a name like "
                        "grid.png")
    state, device = read_checkpoint(args.sample), pick_device(args.device)
    t = argparse.Namespace(cfg=argparse.Namespace(**state["config"]), device=device,
                           gen=core.generator(0, device))
    t.G = networks(t.cfg)[0].to(device)
    try:
        t.G.load_state_dict(state["G"])
    except RuntimeError:
        raise UserError(f"{args.sample} has other networks: use the script that made it") from None
    if (x := torch.cat(list(core.generate(t.G, prior(t, args.n))))).dim() != 4:
        raise UserError(f"{args.sample} draws points, not images")
    save_grid(x, args.out)
    print(args.out)
    return {"out": str(args.out), "n": args.n, "step": state["step"]}


def open_run(trainer, folder, protocol):
    """Write a run's config.json and take up its checkpoint, if there is one -> (rows of its
    metrics.jsonl, what was logged since the last one)."""
    cfg, ckpt, window = trainer.cfg, folder / "ckpt.pt", []
    cfg.data_hash = digest(trainer.data)
    old, now = read_config(folder, cfg, protocol), versions()
    write_json(folder / "config.json", {
        "flags": cfg, "protocol": protocol, "command": sys.argv, "host": platform.machine(),
        "threads": torch.get_num_threads(), **now,
        "git": list(dict.fromkeys([*old.get("git", []), now["git"] or ""]))})
    if ckpt.exists():
        state = read_checkpoint(ckpt)
        if differ := differences(state["config"], vars(cfg)):
            raise UserError(f"{ckpt} was made with another configuration: {differ}")
        trainer.load(state)
        window = list(state["log"].to(trainer.device))
    rows = [r for r in read_rows(folder / "metrics.jsonl")      # not what will be logged again
            if r["step"] <= trainer.step - len(window) * ("d_loss" in r)]
    with atomic(folder / "metrics.jsonl") as tmp:
        tmp.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return rows, window


class DryRun(Exception):
    """What `fit` raises in a dry run, with the trainer and how it is scored."""


def fit(trainer, folder, evaluate=None, best="distance", protocol=None, each_step=False, good=None):
    """Train to cfg.steps: log, score, draw and checkpoint in `folder`; go on from its ckpt.pt.

    evaluate(trainer) -> {name: number}, called every eval_every updates; the state of the lowest
    `best` so far is kept as best.pt, the newest as ckpt.pt, at least every five minutes. A log is
    the mean over log_every updates, with `each_step` a row for each of them. `protocol` says what
    the scores are, in config.json. The images drawn become film.gif in the end; those that are not
    `good(images)` (N,) have red frames. Raises UserError for a folder of another configuration and
    at the first number that is not finite. A first Ctrl-C or SIGTERM finishes the update, saves,
    and exits 130 or 143.
    """
    if getattr(trainer.cfg, "dry", False):
        raise DryRun(trainer, evaluate)
    torch.backends.cudnn.benchmark = True               # shapes do not change
    cfg, (rows, window) = trainer.cfg, open_run(trainer, folder, protocol or {})
    scores = {k: v for r in rows if best in r for k, v in r.items()}
    lowest = min((r[best] for r in rows if best in r), default=math.inf)
    first, start, saved = trainer.step, time.time(), time.time()

    def write(*rows):
        now = {"step": trainer.step, "d_steps": trainer.d_steps}
        with open(folder / "metrics.jsonl", "a") as f:
            f.writelines(json.dumps({**now, **row}) + "\n" for row in rows)

    def save(name):
        file = io.BytesIO()                             # torch.save hides what a full disk says
        torch.save({**trainer.state(), "config": to_jsonable(cfg),
                    "log": torch.stack(window) if window else torch.empty(0)}, file)
        with atomic(folder / name) as tmp:
            tmp.write_bytes(file.getbuffer())

    with stop_signals() as caught, tqdm(
            total=cfg.steps, initial=first, desc=folder.name, unit="step", leave=False,
            disable="GAN_WORKERS" in os.environ or None, smoothing=0.1) as bar:
        while trainer.step < cfg.steps:
            logs = trainer.update()
            window.append(torch.stack(list(logs.values())))
            bar.update()
            log, check = (trainer.step % every == 0 or trainer.step == cfg.steps
                          for every in (cfg.log_every, cfg.eval_every))
            late = time.time() - saved > 300
            if not (caught or log or check or late):
                continue
            if not folder.is_dir():
                raise UserError(f"{folder} has vanished at step {trainer.step}")
            values = finite(trainer, folder, list(logs), torch.stack(window).cpu())
            if log:
                write(*(values if each_step else [show(bar, folder, trainer, values, scores, (
                    trainer.step - first) / (time.time() - start))]))
                window.clear()
            if check and evaluate:
                scores = finite_scores(evaluate(trainer), trainer, folder)
                write(scores)
                bar.set_postfix({k: f"{v:.4g}" for k, v in scores.items() if k == best})
                if scores.get(best, math.inf) < lowest:
                    lowest = scores[best]
                    save("best.pt")
            if check and (x := trainer.preview()).dim() == 4:
                save_grid(frame(x, red(good(x))) if good else x,
                          folder / "samples" / f"{trainer.step:07d}.png")
            if caught or check or late:                 # caught may have come while scoring
                save("ckpt.pt")
                saved = time.time()
            if caught:
                bar.write(f"{folder.name}: saved at step {trainer.step}, --resume goes on",
                          sys.stderr)
                sys.exit(128 + caught[0])
    save_film(folder / "film.gif", {folder.name: folder})


def update_seconds(trainer, n=20):
    """Seconds of an update of G and those of D before it, the fastest of n. They train: score
    before."""
    trainer.step = trainer.cfg.steps // 2       # where no step size has fallen yet
    return min(timeit.repeat(lambda: trainer.update()["g_loss"].item(), number=1, repeat=n))


def finite(trainer, folder, names, window):
    """Rows of what was logged in the last updates, (updates, names); UserError if one is not
    finite."""
    first = trainer.step - len(window) + 1
    if len(bad := (~window.isfinite()).any(1).nonzero()):
        wrong = [k for k, v in zip(names, window[bad[0, 0]]) if not v.isfinite()]
        ckpt = folder / "ckpt.pt"
        kept = f"the last good checkpoint is {ckpt}" if ckpt.exists() else "no checkpoint"
        raise UserError(f"{', '.join(wrong)} not finite at step {first + bad[0].item()} of "
                        f"{folder}; {kept}")
    return [{"step": first + i, "d_steps": (first + i) * trainer.cfg.n_dis,
             **dict(zip(names, values))} for i, values in enumerate(window.tolist())]


def finite_scores(scores, trainer, folder):
    """The scores, numbers or lists of them; UserError if one is not finite."""
    wrong = [k for k, v in scores.items() if not np.isfinite(np.asarray(v, float)).all()]
    if wrong:
        raise UserError(f"{', '.join(wrong)} not finite at step {trainer.step} of {folder}")
    return scores


def show(bar, folder, trainer, values, scores, rate):
    """The means of some rows, which are shown in one aligned line above the progress bar."""
    mean = {k: float(np.mean([row[k] for row in values])) for k in values[0]}
    mean |= {"step": trainer.step, "d_steps": trainer.d_steps}
    left = (trainer.cfg.steps - trainer.step) / rate
    latest = "  ".join(f"{k} {v:.4g}" for k, v in scores.items() if isinstance(v, float))
    bar.write(f"{folder.name}  step {trainer.step:6d}  d_steps {trainer.d_steps:6d}  d_loss "
              f"{mean['d_loss']:8.3f}  g_loss {mean['g_loss']:8.3f}  {rate:6.2f} steps/s  "
              f"{left // 60:3.0f}:{left % 60:02.0f} left  {latest}", file=sys.stdout)
    return mean


# ----------------------------------------------------------------------------------------- figures

# As wide as a page's text, with type to be read there without enlarging.
WIDTH, TYPE = 7, {"font.size": 7, "axes.titlesize": 8, "axes.labelsize": 8, "figure.titlesize": 8,
                  "legend.frameon": False, "legend.handlelength": 3, "lines.linewidth": 1.2,
                  "lines.markersize": 3}
# One colour and dash for each arm everywhere, told apart in greyscale too (Okabe and Ito 2008).
STYLE = {
    "vanilla": {"color": "#000000", "ls": "-"}, "pcr": {"color": "#D55E00", "ls": "--"},
    "sc": {"color": "#0072B2", "ls": "-."}, "sc+pcr": {"color": "#009E73", "ls": (0, (5, 1))},
    "dup": {"color": "#56B4E9", "ls": "-."}, "mixup": {"color": "#CC79A7", "ls": ":"},
    "random": {"color": "#CC79A7", "ls": ":"}, "matched": {"color": "#009E73", "ls": (0, (5, 1))},
}
STYLE |= {new: STYLE[old] for new, old in {     # of other figures
    "fgd": "vanilla", "wor": "pcr", "iid": "sc", "real-wor": "sc+pcr", "epoch": "mixup",
    "ema": "pcr", "r1": "sc", "mix": "pcr", "wide": "sc", "pooled": "sc+pcr", "many-g": "dup",
    "many-d": "mixup"}.items()}


def style(arm):
    """Colour and dash of an arm; one that is not in STYLE gets a colour of its own."""
    return STYLE.setdefault(arm, {"color": f"C{len(STYLE) % 10}", "ls": (0, (3, 1, 1, 1))})


def figure(height):
    """An empty figure of the common width and type; inches."""
    import matplotlib.figure
    matplotlib.rcParams.update(TYPE)
    return matplotlib.figure.Figure(figsize=(WIDTH, height), layout="constrained")


def grid(images, columns=None, pad=1):
    """uint8 (N, C, H, W) -> uint8 array (rows, columns, 3) of all images in a grid."""
    images = torch.as_tensor(images).cpu()
    n, c, h, w = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    canvas = torch.full((rows * columns, 3, h + pad, w + pad), 128, dtype=torch.uint8)
    canvas[:n, :, :h, :w] = images
    canvas = canvas.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    return canvas[:-pad, :-pad].numpy() if pad else canvas.numpy()


def frame(images, colours, width=2):
    """uint8 (N, C, H, W) and colours (N, 3) -> (N, 3, H + 2 width, W + 2 width), framed."""
    out = torch.as_tensor(colours, dtype=torch.uint8)[:, :, None, None].repeat(
        1, 1, *(s + 2 * width for s in images.shape[2:]))
    out[:, :, width:-width, width:-width] = torch.as_tensor(images)
    return out


def red(good):
    """Colours for `frame`: grey for images that are good (N,), red for others."""
    return torch.where(good.cpu()[:, None], 128, torch.tensor([230, 0, 0]))


def save_film(path, runs, most=2 ** 21):
    """Write samples/*.png of {name: folder of a run}, those of all runs side by side, as an
    animated GIF of at most `most` bytes: of too many frames every other one is left out, then they
    are halved. Without two frames nothing is written."""
    from PIL import Image, ImageDraw
    steps = sorted(set.intersection(*({f.stem for f in (run / "samples").glob("*.png")}
                                      for run in runs.values())))
    films = []
    for step in steps:
        parts = [Image.open(run / "samples" / f"{step}.png") for run in runs.values()]
        film = Image.new("RGB", (sum(p.width + 8 for p in parts), parts[0].height + 14), "white")
        x = 0
        for name, part in zip(runs, parts):
            ImageDraw.Draw(film).text((x, 0), f"{name}, {int(step):,} updates", "black")
            film.paste(part, (x, 14))
            x += part.width + 8
        films.append(film)
    while len(films) > 1:
        file = io.BytesIO()
        films[0].save(file, "GIF", save_all=True, append_images=films[1:], loop=0,
                      duration=[200] * (len(films) - 1) + [2000])
        if file.tell() <= most:
            with atomic(path) as tmp:
                tmp.write_bytes(file.getbuffer())
            break
        films = films[::-2][::-1] if len(films) > 10 else [film.reduce(2) for film in films]


def save_grid(images, path, columns=None, least=256):
    """Write a grid as an image file, enlarged by a whole factor to at least `least` px across."""
    from PIL import Image
    picture = Image.fromarray(grid(images, columns))
    factor = max(1, math.ceil(least / picture.width))
    picture = picture.resize((picture.width * factor, picture.height * factor), 0)
    with atomic(path) as tmp:
        picture.save(tmp)


def band(ax, curves, label, **style):
    """Mean over seeds as a line and their range as a band; curves: a list of (x, y) lists."""
    shared = sorted(set.intersection(*(set(x) for x, _ in curves)))
    ys = np.array([[dict(zip(x, y))[s] for s in shared] for x, y in curves])
    line, = ax.plot(shared, ys.mean(0), label=label, **style)
    if len(curves) > 1:
        ax.fill_between(shared, ys.min(0), ys.max(0), color=line.get_color(), alpha=0.2, lw=0)


def save_figure(fig, folder):
    """Write figure.png and say where it and result.json are: the last two lines of a script."""
    with atomic(folder / "figure.png") as tmp:
        fig.savefig(tmp, dpi=200)
    print(folder / "result.json", folder / "figure.png", sep="\n")
