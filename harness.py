"""The shared plumbing: commands, run folders, runs side by side, the training loop, figures.

A run leaves `config.json`, `metrics.jsonl`, `samples/*.png`, `ckpt.pt`, `result.json` and
`figure.png` in its folder; every file appears whole or not at all.
"""
import argparse
import contextlib
import datetime
import hashlib
import io
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows: run folders are not locked there
    fcntl = None

# ------------------------------------------------------------------------------------- runs


class UserError(ValueError):
    """A user's mistake. The message is the one line shown before exit code 2."""


class Follower(Exception):
    """Ends a run in every process but the first, where all work on the same one."""


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


def run_flags(parser, presets):
    """Flags that every script has. `presets` are the names `--preset` accepts."""
    g = parser.add_argument_group("run")
    g.add_argument("--preset", choices=presets, help="default: paper on CUDA, cpu elsewhere")
    g.add_argument("--smoke", action="store_const", const="smoke", dest="preset",
                   help="the same as --preset smoke: seconds, to see that everything works")
    g.add_argument("--seeds", type=int, nargs="+", help="one run each; default 0 or the preset's")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    g.add_argument("--outdir", type=Path, default=Path("runs"), help="parent of all run folders")
    g.add_argument("--name", help="run folder; default: dataset, model and preset")
    g.add_argument("--jobs", type=int, help="runs side by side; default one, on a CPU one a core")
    g.add_argument("--resume", action="store_true", help="go on in an existing run folder")
    g.add_argument("--dry-run", action="store_true", help="print the configuration and stop")
    g.add_argument("--plot", type=Path, metavar="RUN", help="redraw RUN/figure.png and stop")


def pick_device(name):
    """torch.device from `auto`, `cpu`, `cuda`, `cuda:1`; UserError if the machine lacks it."""
    if name == "auto":  # under torchrun a GPU of its own for each process
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # `meta` has no numbers
        if device.type == "cuda":
            torch.cuda.set_device(device)  # where a CUDA graph is captured
    except (RuntimeError, AssertionError, ValueError):
        raise UserError(f"--device {name}: not on this machine; try --device cpu") from None
    return device


def generator(seed, device):
    """A random stream of its own, so that evaluation never disturbs training."""
    return torch.Generator(device).manual_seed(seed)


def plain(value):
    """`value` with paths, devices, tensors and the like turned into what JSON can hold."""
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return value.tolist()
    return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)


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
        tmp.write_text(json.dumps(plain(value), indent=1) + "\n")


def read_json(path):
    """The object in a .json file, or None if there is no such file."""
    return json.loads(path.read_text()) if path.exists() else None


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


def git_hash():
    """Commit of the code, `-dirty` behind it if changed, or None outside a checkout."""
    try:
        return subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], text=True,
                              cwd=Path(__file__).parent, check=True, capture_output=True,
                              timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


FREE_TO_CHANGE = {"resume", "jobs", "seeds", "arms", "outdir", "name", "device", "data_dir",
                  "fid_weights"}


def differences(old, new):
    """What differs between two configurations so that a run of one cannot go on as the other."""
    return "; ".join(f"{k} was {old.get(k)}, is {new.get(k)}" for k in sorted({*old, *new})
                     if k not in FREE_TO_CHANGE and old.get(k) != new.get(k))


HELD = {}  # the lock files of the run folders that this process works in


def hold(folder):
    """Keep other processes out of a run folder until this one ends; UserError if one is in it."""
    lock = folder / ".lock"
    if fcntl and not (folder in HELD and lock.exists()):
        folder.mkdir(parents=True, exist_ok=True)
        HELD[folder] = open(lock, "w")
        try:
            fcntl.flock(HELD[folder], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            HELD.pop(folder).close()
            raise UserError(f"{folder} is in use by another process") from None
        except OSError:
            pass  # a file system without locks


def open_run(folder, cfg, resume, sweep=False):
    """Create `folder` with its config.json, or reopen it under `--resume`; returns the Path.

    `sweep`: under torchrun the first process opens it for all (the parent of the run folders, or
    a run that all work on). Raises UserError if it exists and `resume` is false, if it was made
    with another config, or if another process works in it.
    """
    folder, cfg, path = Path(folder), plain(cfg), Path(folder) / "config.json"
    if sweep and join():
        dist.barrier()  # opened, once the first process is here too
        return folder
    made = [git_hash() or ""]
    if path.exists():
        if not resume:
            raise UserError(f"{folder} exists: go on with --resume, or choose another --name")
        try:
            old = json.loads(path.read_text())
            differ = differences(old["flags"], cfg)
            made += [commit for commit in commits(old) if commit not in made]
        except (json.JSONDecodeError, KeyError):
            raise UserError(f"{path} is damaged: choose another --name") from None
        if differ:
            raise UserError(f"{folder} was made with another configuration, so choose another "
                            f"--name: {differ}")
    hold(folder)
    for left in folder.glob(".*.tmp*"):  # what a kill left half written
        left.unlink(missing_ok=True)
    write_json(path, {"flags": cfg, "command": sys.argv, "host": platform.machine(),
                      "threads": torch.get_num_threads(), **versions(), "git": made})
    if sweep and dist.is_initialized():
        dist.barrier()
    return folder


def commits(config):
    """The commits that a run was started and gone on with at, from its config.json."""
    made = config.get("git") or []
    return [made] if isinstance(made, str) else made


def versions():
    """Commit of the code and versions of what it runs on."""
    return {"git": git_hash(), "python": platform.python_version(), "torch": torch.__version__,
            "numpy": np.__version__}


def chip(device):
    """The name of a device: of the GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError, IndexError):
        return re.findall("model name.*: (.*)", Path("/proc/cpuinfo").read_text())[0]
    return platform.processor() or platform.machine()


def announce(configs, dry_run):
    """Print the resolved configurations; returns dry_run, so that a script can stop there."""
    for cfg in configs if int(os.environ.get("RANK", 0)) == 0 else []:
        print("  ".join(f"{k}={v}" for k, v in sorted(plain(cfg).items()) if v is not None))
    return dry_run


def write_result(folder, script, cfg, device, start, rows, paper):
    """result.json: what was measured since `start`, the paper's numbers, what was asked for, and
    what it was made with: versions, commits, hashes of the training images; not where on the disk.
    """
    made = [read_json(p) for p in (folder / "config.json", *folder.glob("*/config.json"))]
    hashes = {run["flags"].get("data_hash", "") for run in made}
    result = plain({"script": script, "preset": cfg.preset,
                    "seconds": round(time.time() - start, 1),
                    "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
                    "device": f"{device.type}: {chip(device)}, {cores()} cores, "
                              f"{torch.get_num_threads()} threads",
                    **versions(), "git": sorted({c for run in made for c in commits(run)}),
                    "data": sorted(hashes - {""}), "rows": rows, "paper": paper, "config": {
                        k: v for k, v in vars(cfg).items() if k not in ("outdir", "data_dir")}})
    write_json(folder / "result.json", result)
    return result


def read_result(folder, script):
    """The result.json of a run folder of `script`; UserError if there is none."""
    try:
        result = read_json(folder / "result.json")
    except ValueError:  # no JSON, or no text
        result = None
    if not isinstance(result, dict) or result.get("script") != script or not result.get("rows"):
        raise UserError(f"{folder} holds no finished run of {script}.py")
    return result


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


def run_all(run, cells, jobs, device):
    """run(cfg, folder) for every cell (cfg, folder) without a row.json; read all row.json.

    With jobs > 1 each is a process of its own, with its share of the cores; jobs None is one on a
    GPU and one a core elsewhere (two runs on a core each beat one run on two cores by far).
    A signal stops them all, saved. A process that fails leaves the others going; UserError names
    it in the end. Under torchrun every process takes its share of what is left to do, or of each
    batch (--data-parallel), and the first one alone returns, when all are done.
    """
    rank, together = join(), vars(cells[0][0]).get("data_parallel")
    world = dist.get_world_size() if dist.is_initialized() else 1
    jobs = jobs or (1 if device.type == "cuda" else min(len(cells), max(
        1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))))
    waiting = [c for c in cells if not (c[1] / "row.json").exists()]
    if world > 1:
        dist.barrier()  # before any is done, so that all share out the same cells
        jobs, waiting = (1, waiting) if together else (jobs, waiting[rank::world])
    running, failed, told = [], [], False
    while jobs == 1 and waiting:
        cfg, folder = waiting.pop(0)
        try:
            run(cfg, folder)
        except Follower:
            pass
        except (UserError, OSError, torch.OutOfMemoryError) as error:
            if together:
                raise
            print(f"{folder.name}: {error}", file=sys.stderr)
            failed.append(folder.name)
    spawn = multiprocessing.get_context("spawn")
    with stop_signals() as caught:
        while running or (waiting and not caught):
            while waiting and len(running) < jobs and not caught:
                cfg, folder = waiting.pop(0)
                running.append(spawn.Process(name=folder.name, target=run_alone, args=(
                    run, argparse.Namespace(**{**vars(cfg), "jobs": jobs}), folder)))
                running[-1].start()
            multiprocessing.connection.wait([p.sentinel for p in running], timeout=0.5)
            if caught and not told:
                told = True
                for process in running:
                    process.terminate()
            ended = [p for p in running if p.exitcode is not None]  # asked once: it may change
            failed += [p.name for p in ended if p.exitcode]
            running = [p for p in running if p not in ended]
    if caught:
        sys.exit(128 + caught[0])
    if world > 1:
        dist.barrier()  # a failure here must not end what others are at
    if failed:
        raise UserError(f"failed, for the reasons above: {', '.join(failed)}; --resume goes on")
    if world > 1:
        dist.destroy_process_group()
    if rank:
        sys.exit(0)
    return [read_json(folder / "row.json") for _, folder in cells]


def join():
    """Rank of this process among those that torchrun started, 0 without it; joins them once."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=30))
    return dist.get_rank() if dist.is_initialized() else 0


def cores():
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def run_alone(run, cfg, folder):
    """What one process of run_all does."""
    os.environ["WORLD_SIZE"] = "1"  # the share is given out already
    parent = multiprocessing.parent_process()
    threading.Thread(daemon=True, target=lambda: (  # killed without a word: save and stop
        parent.join(), os.kill(os.getpid(), signal.SIGTERM))).start()
    torch.set_num_threads(max(1, cores() // cfg.jobs))
    cli(lambda: run(cfg, folder))


# ---------------------------------------------------------------------------------- the loop


def read_checkpoint(path):
    """The dict of a ckpt.pt, opened without running code; UserError if it is none or damaged."""
    try:
        with zipfile.ZipFile(path) as z:                # torch.load does not look at the checksums
            if bad := z.testzip():
                raise ValueError(f"{bad} is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
        state["G"], state["config"]["model"]
        return state
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except Exception as error:  # torch raises nearly anything on a broken file
        raise UserError(f"{path} is no checkpoint of this project ({type(error).__name__})") \
            from None


def fit(trainer, folder, evaluate=None, best="fid", each_step=False):
    """Train to cfg.steps: log, score, draw and checkpoint in `folder`; go on from its ckpt.pt.

    evaluate(trainer) -> dict of numbers, called every eval_every updates; the state of the lowest
    `best` so far is kept as best.pt. A log is the mean over log_every updates, with `each_step` a
    row for each of them. Raises UserError at the first metric that is not finite. A first Ctrl-C
    or SIGTERM finishes the update, saves, and exits 130 or 143. Under --data-parallel the first
    process alone writes and returns, the others end in Follower.
    """
    cfg, ckpt, metrics = trainer.cfg, folder / "ckpt.pt", folder / "metrics.jsonl"
    log = torch.zeros(cfg.log_every, len(trainer.METRICS), device=trainer.device)
    if ckpt.exists():
        state = read_checkpoint(ckpt)
        if differ := differences(state["config"], plain(cfg)):
            raise UserError(f"{ckpt} was made with another configuration: {differ}")
        trainer.load(state)
        log[:len(state["log"])] = state["log"].to(log)
    if trainer.rank:
        with stop_signals() as caught:
            while trainer.step < cfg.steps:
                trainer.update()
                if stop := trainer.agree(caught):
                    sys.exit(128 + stop)
        raise Follower
    rows = [r for r in read_rows(metrics) if r["step"] <= trainer.step]
    with atomic(metrics) as tmp:
        tmp.write_text("".join(json.dumps(r) + "\n" for r in rows))
    scores = {k: v for r in rows if best in r for k, v in r.items()}
    lowest = min((r[best] for r in rows if best in r), default=math.inf)
    first, start = trainer.step, time.time()
    if cfg.engine == "graph":
        trainer.capture()

    def save(path):
        file = io.BytesIO()                             # torch.save hides what a full disk says
        torch.save({**trainer.state(), "log": log[:trainer.step % cfg.log_every].clone()}, file)
        with atomic(path) as tmp:
            tmp.write_bytes(file.getbuffer())

    def write(*rows):
        now = {"step": trainer.step, "d_steps": trainer.d_steps}
        with open(metrics, "a") as f:
            f.writelines(json.dumps({**now, **row}) + "\n" for row in rows)

    def due(every):
        return trainer.step % every == 0 or trainer.step == cfg.steps

    with stop_signals() as caught, tqdm(
            total=cfg.steps, initial=first, desc=folder.name, unit="step", leave=False,
            disable=cfg.jobs not in (None, 1) or None, smoothing=0.1) as bar:
        while trainer.step < cfg.steps:
            log[(trainer.step - 1) % cfg.log_every] = trainer.update()
            bar.update()
            stop = trainer.agree(caught)
            if not (stop or any(due(getattr(cfg, f"{what}_every"))
                                  for what in ("log", "eval", "sample", "ckpt"))):
                continue
            if not folder.is_dir():
                raise UserError(f"{folder} has vanished at step {trainer.step}")
            window = log[:(trainer.step - 1) % cfg.log_every + 1].cpu()  # the only host copy
            bad = (~window.isfinite()).any(1).nonzero()
            if len(bad):
                at = trainer.step - len(window) + 1 + bad[0].item()
                names = [k for k, v in zip(trainer.METRICS, window[bad[0, 0]]) if not v.isfinite()]
                kept = f"the last good checkpoint is {ckpt}" if ckpt.exists() else "no checkpoint"
                raise UserError(f"{', '.join(names)} not finite at step {at} of {folder}; {kept}")
            if due(cfg.log_every):
                row = dict(zip(trainer.METRICS, window.double().mean(0).tolist()))
                back = range(len(window) - 1, -1, -1)
                write(*[{"step": trainer.step - i, "d_steps": trainer.d_steps - i * cfg.n_dis,
                         **dict(zip(trainer.METRICS, values))}
                        for i, values in zip(back, window.tolist())] if each_step else [row])
                show(bar, folder.name, trainer, row, scores,
                     (trainer.step - first) / (time.time() - start))
            if evaluate and due(cfg.eval_every):
                scores = evaluate(trainer)
                write(scores)
                bar.set_postfix({k: f"{v:.4g}" for k, v in scores.items() if k == best})
                if scores.get(best, math.inf) < lowest:
                    lowest = scores[best]
                    save(folder / "best.pt")
            if due(cfg.sample_every):
                save_grid(trainer.shown(), folder / "samples" / f"{trainer.step:07d}.png")
            if trainer.world == 1:
                stop = trainer.agree(caught)            # while it was scoring, too
            if stop or due(cfg.ckpt_every):
                save(ckpt)
            if stop:
                sys.exit(128 + stop)


def show(bar, name, trainer, row, scores, rate):
    """One aligned line for a log, above the progress bar where there is one."""
    left = (trainer.cfg.steps - trainer.step) / rate
    numbers = "  ".join(f"{k} {v:8.3f}" for k, v in row.items() if k in ("d_loss", "g_loss"))
    latest = "  ".join(f"{k} {v:.4g}" for k, v in scores.items() if isinstance(v, float))
    bar.write(f"{name}  step {trainer.step:6d}  d_steps {trainer.d_steps:6d}  {numbers}  "
              f"{rate:6.2f} steps/s  {left // 60:3.0f}:{left % 60:02.0f} left  {latest}",
              file=sys.stdout)


# ------------------------------------------------------------------------------------ figures

# As wide as a page's text or GitHub's column, with type to be read there without enlarging.
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


def figure(height):
    """An empty figure of the common width and type; inches."""
    matplotlib.rcParams.update(TYPE)
    return Figure(figsize=(WIDTH, height), layout="constrained")


def grid(images, columns=None, pad=1):
    """uint8 (N, C, H, W) -> uint8 array (rows, columns, 3) of all images in a grid."""
    images = images.cpu()
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


def save_grid(images, path, columns=None, least=256):
    """Write a grid as an image file, enlarged by a whole factor to at least `least` px across."""
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
