"""Commands: flags and presets -> a list of runs -> their rows -> result.json, and verdicts.

A run is a configuration with a folder of its own, cfg.run. A process takes the next one that has
no `row.json` and that nobody holds, trains it, and goes on to the next one; it holds it by a lock
of the operating system, which is free the moment the process dies. So `--jobs N`, torchrun, srun,
a Slurm array and a second shell are all the same: this command, several times.
"""
import argparse
import contextlib
import datetime
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch

import core
import harness
from core import UserError

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

# -------------------------------------------------------------------------------- flags and presets

# flag: (type, help), (type, smallest, largest, help) or (choices, help). They have no defaults: a
# script's PRESETS give the values, and flags override them.
FLAGS = {
    "steps": (int, 1, 10 ** 12, "updates of G"),
    "d_steps": (int, 1, 10 ** 12, "updates of D, instead of --steps"),
    "batch": (int, 2, 10 ** 6, "images per batch"),
    "n_dis": (int, 1, 10 ** 12, "updates of D per update of G"),
    "lr_g": (float, 0, 10 ** 6, "Adam step size of G"),
    "lr_d": (float, 0, 10 ** 6, "Adam step size of D"),
    "beta1": (float, 0, 0.999999, "Adam"),
    "beta2": (float, 0, 0.999999, "Adam"),
    "lr_decay": (bool, "step sizes fall to 0 over the second half of the run"),
    "loss": (tuple(core.LOSSES), "of D and G"),
    "gp_weight": (float, 0, 10 ** 6, "weight of the gradient penalty, 0 for none"),
    "gp_comb": (bool, "let the penalty reach the extra negatives too"),
    "comb_weight": (float, 0, 0.999999, "share of the extra negatives, eq. (13); paper: 0.5"),
    "arch": (("dcgan", "sagan"), "sagan: the same under spectral norm, with attention"),
    "size": (int, 8, 4096, "pixels"),
    "z_dim": (int, 1, 10 ** 6, "latent size"),
    "width": (int, 1, 4096, "channels of the widest resolution"),
    "base": (int, 1, 2048, "pixels of the coarsest level of the networks"),
    "norm_d": (("none", "batch", "layer"), "normalisation in D"),
    "init_d": (("dcgan", "he"), "first weights of D"),
    "precision": (("fp32", "bf16"), "of the passes of G, D and the scoring network (fp32)"),
    "ema_beta": (float, 0, 0.999999, "decay of the averaged G, 0 for none"),
    "flip": (bool, "random mirror images"),
    "checks": (int, 1, 10 ** 12, "how many scores, grids and checkpoints a run has"),
    "eval_every": (int, 1, 10 ** 12, "updates of G between them, instead of --checks"),
    "log_every": (int, 1, 10 ** 6, "updates of G between logs"),
    "n_fid": (int, 2, 10 ** 6, "generated images per score")}
NOT_CONFIG = {"sample", "n", "out", "plot", "dry_run", "command", "started", "script"}


class Parser(argparse.ArgumentParser):
    """A mistake is one line, without the usage of every flag before it."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists all flags)\n")


def add_flags(group, specs):
    """Add flags, given as FLAGS are, to an argparse group."""
    for name, (kind, *_, text) in specs.items():
        how = ({"action": argparse.BooleanOptionalAction} if kind is bool else
               {"choices": kind, "type": type(kind[0])} if isinstance(kind, tuple) else
               {"type": kind})
        group.add_argument(f"--{name.replace('_', '-')}", help=text, **how)


def parser(doc, presets, own, arms=None, training=FLAGS):
    """The ArgumentParser of a script: its `own` flags, those of every script, of training."""
    p = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(p.add_argument_group("this script (default: the preset's value)"), own)
    add = p.add_argument_group("run").add_argument
    add("--preset", choices=presets, help="default: paper on CUDA, cpu elsewhere")
    add("--smoke", action="store_const", const="smoke", dest="preset",
        help="the same as --preset smoke: seconds, to see that everything works")
    if arms:
        add("--arms", nargs="+", choices=list(arms), help="arms to run, of those named above")
    add("--seeds", type=int, nargs="+", help="one run each; default 0 or the preset's")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--outdir", type=Path, default=Path("runs"), help="parent of all run folders")
    add("--name", help="run folder; default: dataset, model and preset")
    add("--jobs", type=int, help="runs side by side; default: one a core, on a GPU at most 4")
    add("--resume", action="store_true", help="go on in an existing run folder")
    add("--dry-run", action="store_true", help="print the configuration and its cost, and stop")
    add("--plot", type=Path, metavar="RUN", help="redraw RUN/figure.png and stop")
    if training:
        add_flags(p.add_argument_group("training (default: the preset's value)"), training)
        add = p.add_argument_group("images from a checkpoint, no training").add_argument
        add("--sample", type=Path, metavar="CKPT", help="draw from CKPT's G and stop")
        add("--n", type=int, default=64, help="how many images")
        add("--out", type=Path, default=Path("grid.png"), help="where to write them")
    return p


def parse(parser, file, argv=None):
    """The flags given to the script `file`; the preset is chosen by the device if not given."""
    args = parser.parse_args(argv)
    args.command = [sys.executable, *(sys.orig_argv[1:] if argv is None else [file, *argv])]
    args.script, args.started = Path(file).stem, time.time()
    if args.jobs is not None and not 1 <= args.jobs <= 1000:
        raise UserError(f"--jobs {args.jobs}: must be from 1 to 1000")
    if not args.plot:
        gpu = harness.pick_device(args.device).type == "cuda"
        args.preset = args.preset or ("paper" if gpu else "cpu")
    return args


def resolve(args, own, *presets, **fixed):
    """Presets (dicts, later ones win), then the flags given, then `fixed` -> Namespace. steps and
    d_steps follow from each other by n_dis, eval_every from `checks` where it is not given.
    UserError for a preset's key that is no flag, a value out of its bounds, and huge networks."""
    cfg = {k: v for k, v in vars(args).items() if k not in NOT_CONFIG}
    given = {k: v for k, v in cfg.items() if v is not None}
    if {"steps", "d_steps"} <= given.keys():
        raise UserError("--steps and --d-steps: give one of them, n_dis gives the other")
    for layer in ({"precision": "fp32"}, *presets, given, fixed):
        if unknown := layer.keys() - cfg.keys() - fixed.keys():
            raise UserError(f"a preset sets {', '.join(sorted(unknown))}: no flag of that name")
        if {"steps", "d_steps"} & layer.keys():  # the later word on the length counts
            cfg |= {"steps": None, "d_steps": None}
        cfg |= layer
    for key, (_, *bounds, _) in (FLAGS | own).items():
        if len(bounds) == 2 and cfg[key] is not None and not bounds[0] <= cfg[key] <= bounds[1]:
            raise UserError(f"--{key.replace('_', '-')} is {cfg[key]}: must be at least "
                            f"{bounds[0]} and at most {bounds[1]}")
    cfg["seeds"], cfg["arms"] = (list(dict.fromkeys(cfg[k] or [0])) for k in ("seeds", "arms"))
    if not all(0 <= seed < 2 ** 63 for seed in cfg["seeds"]):
        raise UserError(f"--seeds {cfg['seeds']}: must be in [0, 2^63)")
    if cfg["steps"] is None and cfg["d_steps"] < cfg["n_dis"]:
        raise UserError(f"--d-steps {cfg['d_steps']}: less than one round of {cfg['n_dis']} n_dis")
    cfg["steps"] = cfg["steps"] or cfg["d_steps"] // cfg["n_dis"]
    cfg["d_steps"] = cfg["steps"] * cfg["n_dis"]
    cfg["jobs"] = cfg["jobs"] or side_by_side(harness.pick_device(cfg["device"]))
    cfg["log_every"] = min(cfg["log_every"], cfg["steps"])
    cfg["eval_every"] = cfg["eval_every"] or max(cfg["steps"] // cfg["checks"], 1)
    cfg = argparse.Namespace(**cfg)
    with torch.device("meta"):  # takes no memory
        n = sum(p.numel() for net in core.build(cfg) for p in net.parameters())
    if n > 2 ** 30:
        raise UserError(f"--size {cfg.size} --base {cfg.base} --width {cfg.width} --z-dim "
                        f"{cfg.z_dim}: networks of {n} weights, at most 2^30 are allowed")
    return cfg


def side_by_side(device):
    """How many runs train at once if nobody says: on a CPU one a core; on a GPU at most 4, each
    with a core and 4 GiB of free memory; one where torchrun or Slurm starts the processes."""
    if launched():
        return 1
    if device.type != "cuda":
        return harness.cores()
    return max(1, min(4, harness.cores(), torch.cuda.mem_get_info(device)[0] // 2 ** 32))


def note_bf16(precision, device):
    """Say so where bfloat16 is slower than float32, for want of instructions."""
    with contextlib.suppress(OSError):
        if precision == "bf16" and not (
                "bf16" in Path("/proc/cpuinfo").read_text() if device.type == "cpu" else
                torch.cuda.is_bf16_supported(including_emulation=False)):
            print(f"note: {harness.chip(device)} has no instructions for bfloat16, so that "
                  "--precision bf16 is slower here than fp32", file=sys.stderr)


def announce(runs, dry_run, run=None):
    """Print the first configuration, of the others what is different, and, for a dry run, what
    it costs to `run` them; returns dry_run."""
    if not worker():
        for before, cfg in zip([{}, *map(vars, runs)], runs):
            print("  ".join(f"{k}={v}" for k, v in sorted(vars(cfg).items())
                            if v is not None and before.get(k) != v))
        note_bf16(vars(runs[0]).get("precision"), harness.pick_device(runs[0].device))
    if dry_run and run:
        print_cost(runs, run)
    return dry_run


def print_cost(runs, run):
    """Time an update and a score of a few images of each kind of run -> hours for all of them."""
    measured, total, jobs = {}, 0, min(runs[0].jobs, len(runs))
    torch.set_num_threads(max(1, harness.cores() // jobs))

    def seconds(device, call, *args):
        for _ in range(2):                              # the first call is slower
            start = time.time()
            call(*args)
            torch.get_device_module(device).synchronize(device)
        return time.time() - start

    for cfg in (cfg for cfg in runs if cfg.arm in cfg.arms):
        kind = str({k: v for k, v in vars(cfg).items() if k not in ("seed", "run")})
        if kind not in measured:
            few = {k: min(vars(cfg)[k] or 50, 50) for k in ("n_fid", "n_real") if k in vars(cfg)}
            try:
                run(argparse.Namespace(**vars(cfg) | few, dry=True), Path())
            except harness.DryRun as stopped:
                t, evaluate = stopped.args
            update = seconds(t.device, t.update)
            score = seconds(t.device, evaluate, t) if evaluate else 0
            measured[kind] = update, score / few["n_fid"]
            print(f"{cfg.run}: {update:.3g} s an update of G, {score:.3g} s to score "
                  f"{few['n_fid']} images")
        update, image = measured[kind]
        total += cfg.steps * update + -(-cfg.steps // cfg.eval_every) * cfg.n_fid * image
    print(f"{len(runs)} runs, {jobs} at a time: about {total / jobs / 3600:.2g} hours here")


# --------------------------------------------------------------------------------------- many runs


def lock(path, how):
    """Hold a lock on the file `path` until what is returned is closed; None if another has it. how:
    `wait` or `try` for it alone, or `share` it. A nullcontext where the disk has no locks."""
    file = contextlib.nullcontext()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")
        fcntl.flock(file, {"wait": fcntl.LOCK_EX, "try": fcntl.LOCK_EX | fcntl.LOCK_NB,
                           "share": fcntl.LOCK_SH}[how])
        return file
    except (AttributeError, OSError) as error:
        with file:      # which closes it
            return None if isinstance(error, BlockingIOError) else contextlib.nullcontext()


@contextlib.contextmanager
def entered(folder, runs, resume):
    """Be in the folder of a sweep, beside processes of the same command (yields False) or, where
    the disk has no locks, alone (True): a file says that one is in, and a second one is refused.
    Refused are also other configurations and, without `resume`, a folder that nobody is in, but
    for the last of the processes that torchrun or srun started, if the others are through."""
    launcher = os.getppid() if launched() else None
    with lock(folder / ".door", "wait"):                # they come in one by one
        held, alone = lock(folder / ".lock", "try"), folder / ".alone"
        lockless = isinstance(held, contextlib.nullcontext)
        if lockless and alone.exists():
            raise UserError(f"{folder}: its disk has no file locks, so that only one process can "
                            f"work in it; if there is none now, delete {alone}")
        if held and not resume and (folder / "config.json").exists() and not (
                launcher and harness.read_json(folder / "config.json").get("launcher") == launcher):
            raise UserError(f"{folder} exists: go on with --resume, or choose another --name")
        for cfg in runs:
            harness.read_config(folder / cfg.run, cfg)
        if held:
            for left in (*folder.rglob(".*.tmp*"), *folder.glob("*/failed.txt")):
                left.unlink(missing_ok=True)            # half written, or worth another try
            harness.write_json(folder / "config.json", {
                "command": sys.argv, "launcher": launcher, **harness.versions()})
            alone.touch() if lockless else fcntl.flock(held, fcntl.LOCK_SH)
        held = held or lock(folder / ".lock", "share")
    try:
        with held:
            yield lockless
    finally:
        if lockless:
            alone.unlink(missing_ok=True)


def launched():
    """Whether torchrun or Slurm started this process, beside others."""
    return bool({"LOCAL_RANK", "SLURM_LOCALID"} & os.environ.keys())


def worker():
    """How many processes `start_workers` started, if this is one of them, else 0."""
    return int(os.environ.get("GAN_WORKERS", 0))


def without(runs, folder, *files):
    """The runs in whose folders none of these files is."""
    return [cfg for cfg in runs if not any((folder / cfg.run / name).exists() for name in files)]


def train_all(args, name, runs, run):
    """Train all `runs`, together with any other process that is at it -> folder, all rows.
    run(cfg, folder) -> rows is called for each one that has no row.json and that no other process
    holds; if this one dies, the next process goes on with it. `--jobs N` starts this command N
    times. A run that fails leaves the others going; UserError names it in the end."""
    folder = args.outdir / args.script / (args.name or name)
    if processes := worker() or int(os.environ.get("LOCAL_WORLD_SIZE", 0)):
        torch.set_num_threads(max(1, harness.cores() // processes))   # torchrun says one
    with entered(folder, runs, args.resume) as lockless:
        jobs = min(getattr(runs[0], "jobs", 1), len(without(runs, folder, "row.json")))
        if worker():
            threading.Thread(target=follow, daemon=True).start()
        elif jobs > 1 and not lockless:
            start_workers(args.command, jobs)
        work(runs, run, folder)     # after workers: what they left, if all of them were killed
    if failed := [cfg.run for cfg in without(runs, folder, "row.json")]:
        raise UserError(f"failed, for the reasons above: {', '.join(failed)}; --resume goes on")
    if worker():
        sys.exit(0)
    rows = [harness.read_json(folder / cfg.run / "row.json") for cfg in runs]
    return folder, [r for row in rows for r in (row if isinstance(row, list) else [row])]


def work(runs, run, folder):
    """Take one run after the other until all are finished or have failed."""
    start, done, ends, processes = time.time(), 0, ("row.json", "failed.txt"), worker() or 1
    while waiting := without(runs, folder, *ends):
        for cfg in waiting:
            here = folder / cfg.run
            if held := lock(here / ".lock", "try"):
                break
        else:
            time.sleep(0.5)             # others are at all that is left; one of them may die
            continue
        with held:
            if without([cfg], folder, *ends):
                try:
                    harness.write_json(here / "row.json", run(cfg, here))
                except (UserError, OSError, torch.OutOfMemoryError) as error:
                    print(f"{cfg.run}: {error}", file=sys.stderr)
                    with contextlib.suppress(OSError):
                        (here / "failed.txt").write_text(str(error))
        done, left = done + 1, len(without(runs, folder, "row.json"))
        if len(runs) > 1:
            seconds = round((time.time() - start) / done * left / processes)
            print(f"sweep: {len(runs) - left} of {len(runs)} runs done, {min(processes, left)} "
                  f"running, {left} left, about {datetime.timedelta(seconds=seconds)} to go",
                  flush=True)


def start_workers(command, n):
    """Run `command` n times until all have ended; a signal is passed on, and ends this one too."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environ = {**os.environ, "GAN_WORKERS": str(n), "GAN_PARENT": str(os.getpid()),
               "PYTHONPATH": path}
    with harness.stop_signals() as caught:
        children, told = [subprocess.Popen(command, env=environ) for _ in range(n)], False
        while alive := [child for child in children if child.poll() is None]:
            if caught and not told:
                told = True
                for child in alive:
                    child.terminate()
            time.sleep(0.1)
    if caught:
        sys.exit(128 + caught[0])


def follow():
    """Stop this process, saved, once the one that started it is gone."""
    while os.getppid() == int(os.environ["GAN_PARENT"]):
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


# ---------------------------------------------------------------------------------------- results


def write_result(args, folder, runs, rows, claims):
    """result.json: what was measured, what it says of the paper's claims, what it was made with
    (but for where on the disk and how many at once: no part of what is to be repeated)."""
    made = [harness.read_json(path) for path in sorted(folder.glob("*/config.json"))]
    flat = harness.to_jsonable([vars(cfg) for cfg in runs])
    device = harness.pick_device(args.device)
    command = re.sub(r" --(outdir|data-dir|name|jobs|fid-weights)[ =]\S+| --resume", "", " ".join(
        ["python", *(Path(word).name if word.endswith(".py") else word
                     for word in args.command[1:])]))
    same = {k: v for k, v in flat[0].items() if all(k in f and f[k] == v for f in flat)}
    result = harness.to_jsonable({
        "script": args.script, "preset": args.preset, "command": command,
        "seconds": round(time.time() - args.started, 1),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": f"{device.type}: {harness.chip(device)}, {harness.cores()} cores, "
                  f"{torch.get_num_threads()} threads",
        **harness.versions(), "git": sorted({commit for run in made for commit in run["git"]}),
        "data": sorted({run["flags"].get("data_hash", "") for run in made} - {""}),
        "claims": claims, "rows": rows,
        "config": {k: v for k, v in same.items() if k not in ("outdir", "data_dir", "resume")},
        "runs": {f["run"]: {k: v for k, v in f.items() if k not in same} for f in flat}})
    harness.write_json(folder / "result.json", result)
    for claim in claims:
        print("  ".join(f"{k}: {v}" for k, v in claim.items() if v not in ("", True, False)))
    return result


def read_result(folder, script):
    """The result.json of a run folder of `script`; UserError if there is none."""
    result = harness.read_json(folder / "result.json")
    if not isinstance(result, dict) or result.get("script") != script or not result.get("rows"):
        raise UserError(f"{folder} holds no finished run of {script}.py")
    return result


def values(rows, key, **where):
    """The numbers under `key` of the rows that have these entries, in the order of the rows."""
    return [r[key] for r in rows if all(r.get(k) == v for k, v in where.items())]


def verdict(better, worse, higher=True):
    """`holds` if every number of one list, a seed each, beats all of the other; `in part` if only
    their means are in that order, `no` if not even these; `not decided` with one seed or none."""
    if not (better and worse):
        return "not decided (rival not run)"
    a, b = ([x if higher else -x for x in numbers] for numbers in (better, worse))
    if len(a) < 2 or len(b) < 2:
        return "not decided (one seed)"
    return "holds" if min(a) > max(b) else "in part" if np.mean(a) > np.mean(b) else "no"


def beside(numbers, arm, higher=False):
    """An arm against each other one of {arm: numbers}: `in part against dup; no against mixup`."""
    against = {}
    for other in [a for a in numbers if arm in numbers and a != arm]:
        against.setdefault(verdict(numbers[arm], numbers[other], higher), []).append(other)
    return "; ".join(f"{word} against {', '.join(others)}" for word, others in against.items())


def all_of(*verdicts):
    """The verdict of a claim that says several things: the worst of theirs."""
    return max(verdicts, key=["holds", "in part", "not decided (one seed)",
                               "not decided (rival not run)", "no"].index)


def spread(numbers, unit=1):
    """`11.2 (10.9 to 11.6)`: mean and range, three digits; of shares, unit 100, in percent."""
    rounded = (float(f"{unit * f(numbers):.3g}") for f in (min, np.mean, max))
    low, mean, high = (f"{v:,.0f}" if abs(v) >= 1000 else f"{v:.3g}" for v in rounded)
    return mean + "%" * (unit == 100) + (f" ({low} to {high})" if low != high else "")
