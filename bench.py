"""How fast it is here: training steps, runs per hour, and FID; other tools beside it.

    python bench.py [train|fid] [--peers] [--json]

A number is the median of `--repeats` timings, its quartiles beside it. What is compared takes
turns, A B A B, so that noise hits all; `time_ratio` is the median, over the turns, of its time to
that of the first of its group. A share of the peak is counted FLOPs against a large float32 matmul
on the same device and threads. `--peers` times other tools, where installed: see bench_peers.py.
"""
import argparse
import concurrent.futures
import contextlib
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import scipy
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import core
import data
import exp_pcr_natural as natural
import fid
import harness

ARMS = {"eager": "vanilla", "eager pcr": "pcr"}
CPU = dict(     # seconds of a timing at least, of runs side by side; cells; sizes and counts
    repeats=5, least=0.05, window=10, models=[*natural.MODELS], presets=["paper", "cpu"],
    sizes=[32], jobs=[1, 2, 4, 8], matmul=2048, images=16, dims=[64, 192, 768, 2048])
CUDA = CPU | dict(repeats=9, least=0.5, sizes=[32, 64], matmul=8192, images=256)
SMOKE = CPU | dict(repeats=2, least=0, window=0.1, models=["wgangp"], presets=["smoke"], jobs=[2],
                   matmul=128, images=2, dims=[64])


class Bench:
    """What the parts share: settings and device. `rows` are the numbers, `left_out` the reasons."""

    def __init__(self, args, device):
        self.args, self.device = args, device
        self.rows, self.left_out, self.versions = [], {}, {"scipy": scipy.__version__}
        self.__dict__ |= SMOKE if args.smoke else CUDA if device.type == "cuda" else CPU
        self.repeats = args.repeats or self.repeats

    def time_in_turns(self, functions):
        """Seconds of each function of {name: function}, warmed up -> {name: (repeats,)}."""
        clock = {"wall": time.perf_counter, "cpu": time.process_time}[self.args.clock]

        def seconds(function, calls=1):
            synchronize(self.device)
            start = clock()
            for _ in range(calls):
                function()
            synchronize(self.device)
            return max(clock() - start, 1e-9) / calls

        calls = {}
        for name, function in functions.items():
            with self.attempt(name):
                warm_up = seconds(function)
                calls[name] = 1 if warm_up > 1 else max(1, round(self.least / seconds(function)))
        turns = [{name: seconds(functions[name], n) for name, n in calls.items()}
                 for _ in range(self.repeats)]
        return {name: np.array([turn[name] for turn in turns]) for name in calls}

    @contextlib.contextmanager
    def attempt(self, name):
        """Go on without what fails in here, and say why: a tool may fail in any way."""
        try:
            yield
        except Exception as error:
            self.left_out[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"left out: {name}, {self.left_out[name]}", file=sys.stderr)

    def peers(self, kind, *args):
        """{tool: function} of those installed, with --peers; imported here and nowhere else."""
        functions = {}
        if self.args.peers:
            import bench_peers
            for tool, build in getattr(bench_peers, kind).items():
                with self.attempt(f"{tool}, {kind}"):
                    functions |= {tool: function} if (function := build(*args)) else {}
                    self.versions[tool] = importlib.metadata.version(tool)
        return functions

    def row(self, part, name, unit, values, **more):
        """Keep a number, the median of `values`, and print it with its quartiles."""
        low, value, high = (float(v) for v in np.percentile(values, [25, 50, 75]))
        self.rows.append({"part": part, "name": name, "unit": unit, "value": value, "low": low,
                          "high": high, "repeats": np.size(values), **harness.to_jsonable(more)})
        print(f"{part:8s} {name:48s} {value:9.4g} {unit:12s} {low:9.4g} to {high:<9.4g}", "  ".join(
            f"{k} {v:.4g}" for k, v in more.items()))

    def rates(self, part, name, unit, amount, functions, more=lambda which, seconds: {}):
        """A row for each function, timed in turns: `amount` a second, its time to the first's."""
        times = self.time_in_turns(functions)
        for which, t in times.items():
            ratio = np.median(t / next(iter(times.values())))
            self.row(part, f"{name} {which}", unit, amount / t, time_ratio=float(ratio),
                     **more(which, float(np.median(t))))
        return times


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Flops(TorchDispatchMode):
    """Counts the FLOPs of convolutions and matrix products inside, a multiply-add as two.

    By the formulas of PyTorch's FlopCounterMode, whose hooks do not stand a gradient penalty.
    """

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func._overloadpacket):
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


# ------------------------------------------------------------------------------------- training


def configure(model, preset, device, size=32, **changes):
    """A cell of exp_pcr_natural.py on 10,000 random images, `size` pixels wide. The preset `cpu`
    has 32 channels here, as the tables of speed have it."""
    width = ["--width", "32"] if preset == "cpu" else []
    args = natural.flags().parse_args(["--preset", preset, "--size", str(size), *width])
    return argparse.Namespace(**vars(natural.configure(args, model, "cifar10")) | {
        "seed": 0, "arm": "vanilla", "device": device, "n_train": 10_000, **changes})


def make(cfg):
    """The trainer of a cell. What an update costs does not depend on what the images show."""
    images = torch.randint(256, (cfg.n_train, cfg.channels, cfg.size, cfg.size), dtype=torch.uint8)
    return core.Trainer(cfg, images.to(cfg.device), *natural.networks(cfg), natural.ARMS[cfg.arm])


def train(b):
    """Updates of G per second by model, preset and arm; then runs per hour, side by side."""
    a, work = torch.randn(b.matmul, b.matmul, device=b.device), 2 * b.matmul ** 3
    times = b.rates("train", f"float32, {b.matmul} wide", "FLOP/s", work, {"matmul": lambda: a @ a})
    peak = work / np.median(times["matmul"])
    for model, preset, size in itertools.product(b.models, b.presets, b.sizes):
        cell, name = (model, preset, b.device, size), f"{model} {preset}, {size} px,"
        cfg, functions, flops = configure(*cell), {}, {}
        for arm, loss in ARMS.items():
            functions[arm] = make(configure(*cell, arm=loss)).update
            with Flops() as counter:
                functions[arm]()
            flops[arm] = counter.total
        functions |= b.peers("TRAIN", make(cfg))
        b.rates("train", name, "G steps/s", 1, functions, lambda arm, t, n=cfg.n_dis, f=flops: {
            "d_steps_per_s": n / t,
            **({"peak_percent": 100 * f[arm] / t / peak} if arm in f else {})})
        for jobs in b.jobs:
            share = max(1, harness.cores() // jobs)
            with b.attempt(f"{name} {jobs} together"):
                found = side_by_side(b, [configure(*cell, arm="pcr", threads=share)] * jobs)
                b.row("train", f"{name} eager pcr, {jobs} together", "runs/hour",
                      3600 / cfg.steps * sum(one["rate"] for one in found),
                      mib_each=max(one["mib"] for one in found))


def side_by_side(b, cells):
    """Train cells at once, each in a new process -> their {rate, mib}."""
    spawn = multiprocessing.get_context("spawn")
    with spawn.Manager() as manager, \
            concurrent.futures.ProcessPoolExecutor(len(cells), spawn) as pool:
        all_ready = manager.Barrier(len(cells), timeout=300)    # else one that died stops all
        return list(pool.map(time_alone, cells, [b.window] * len(cells), [all_ready] * len(cells)))


def time_alone(cfg, window, all_ready):
    """Train, and time it once all processes are ready."""
    torch.set_num_threads(cfg.threads)
    trainer, n = make(cfg), 0
    trainer.update()
    all_ready.wait()
    synchronize(cfg.device)
    start = time.perf_counter()
    while n < 2 or time.perf_counter() - start < window:
        trainer.update()
        n += 1
        if n % 10 == 0 or cfg.device.type == "cpu":
            synchronize(cfg.device)
    synchronize(cfg.device)
    return {"rate": n / (time.perf_counter() - start), "mib": peak_mib(cfg.device)}


def peak_mib(device):
    """Most memory this process has had, in MiB: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss       # kB on Linux, bytes on a Mac
    return most / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


# ------------------------------------------------------------------------------------------ FID


def weights_file(data_dir, folder):
    """The Inception weights in `data_dir`, or random ones, as fast, as any tool wants them."""
    found = sorted((data_dir / "inception").glob("*2015*.pth"))
    state = torch.load(found[0], weights_only=True) if found else fid.Inception().state_dict()
    state = {**state, "fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    torch.save(state, Path(folder) / "weights.pth")
    return Path(folder) / "weights.pth"


def frechet(b):
    """Images per second of the FID network, by width and precision; then the distance."""
    x, pays = torch.randint(256, (b.images, 3, 32, 32), dtype=torch.uint8).to(b.device), True
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        weights = weights_file(b.args.data_dir, folder)
        for dims in b.dims:
            net = fid.load_inception(dims=dims, weights=weights, device=b.device)
            functions = {"fid.py": lambda net=net: net(x)}
            if pays:    # no matter how slow, but not again
                bf16 = torch.autocast(b.device.type, torch.bfloat16)
                functions["bf16 autocast"] = bf16(lambda net=net: net(x))
            times = b.rates("fid", f"{dims} features,", "images/s", len(x), {
                **functions, **(b.peers("FEATURES", weights, x) if dims == 2048 else {})})
            pays = bool((times.get("bf16 autocast", np.inf) < times["fid.py"]).mean() > 0.5)
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    flags = [f"--{name}" for name in ("peers", "smoke") if getattr(b.args, name)]
    done = subprocess.run(      # libraries learn that there is one thread before they start
        [sys.executable, __file__, "distance", "--json", "--clock", b.args.clock, "--repeats",
         str(min(b.repeats, 3)), *flags], env={**os.environ, **one}, check=True,
        stdout=subprocess.PIPE)
    found = json.loads(done.stdout)
    b.rows += found["rows"]
    b.left_out |= found["left_out"]


def distance(b):
    """Seconds of the distance between two sets of random features, and what comes out."""
    dims, gen, sides, found = b.dims[-1], core.generator(0), [], {}
    mix = torch.randn(dims, dims, generator=gen) / dims ** 0.5
    for _ in range(2):
        stats = fid.Statistics(dims)
        stats.add((torch.randn(2 * dims, dims, generator=gen) @ mix).relu())
        sides += [stats.mean, stats.cov]
    mu1, cov1, mu2, cov2 = arrays = [side.numpy() for side in sides]

    def textbook():
        root = scipy.linalg.sqrtm(cov1 @ cov2).real
        return ((mu1 - mu2) ** 2).sum() + np.trace(cov1 + cov2 - 2 * root)

    functions = {"fid.py": lambda: fid.frechet_distance(*sides), "scipy sqrtm": textbook,
                 **b.peers("DISTANCE", arrays, sides)}
    times = b.time_in_turns({name: lambda name=name, f=f: found.update({name: float(f())})
                             for name, f in functions.items()})
    for name, t in times.items():
        b.row("fid", f"distance of {dims} features, one thread, {name}", "s", t, time_ratio=float(
            np.median(t / times["fid.py"])), distance=found[name])


# ------------------------------------------------------------------------------------------ run

PARTS = {"train": train, "fid": frechet, "distance": distance}


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("part", nargs="?", choices=[*PARTS],
                   help="default: train and fid, of which distance is a part")
    p.add_argument("--peers", action="store_true", help="other tools too, where installed")
    p.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    p.add_argument("--smoke", action="store_true", help="seconds: to see that everything works")
    p.add_argument("--repeats", type=int, help="timings of each; default 5, on a GPU 9")
    p.add_argument("--threads", type=int, help="of one run at a time; default PyTorch's choice")
    p.add_argument("--clock", choices=["wall", "cpu"], default="wall",
                   help="cpu: processor time, for a busy machine and one thread (%(default)s)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    p.add_argument("--data-dir", type=Path, default=data.DATA_DIR, help="may hold FID's weights")
    args = p.parse_args(argv)
    device, start, load = harness.pick_device(args.device), time.time(), os.getloadavg()
    if any(n is not None and n < 1 for n in (args.repeats, args.threads)):
        raise core.UserError("--repeats and --threads: must be at least 1")
    if args.clock == "cpu" and device.type == "cuda":
        raise core.UserError("--clock cpu: sees nothing of a GPU; take --clock wall")
    if args.threads:
        torch.set_num_threads(args.threads)
    b = Bench(args, device)
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
        for part in [args.part] if args.part else ["train", "fid"]:
            PARTS[part](b)
    result = {
        "device": harness.chip(device) if device.type == "cuda" else "cpu",
        "processor": harness.chip(torch.device("cpu")), "cores": harness.cores(),
        "instructions": torch.backends.cpu.get_cpu_capability(), "load": load[0],
        "threads": torch.get_num_threads(), "repeats": b.repeats, "clock": args.clock,
        "seconds": time.time() - start, "versions": {**harness.versions(), **b.versions},
        "rows": b.rows, "left_out": b.left_out}
    print(json.dumps(result) if args.json else "\n".join(
        f"{k}: {v}" for k, v in result.items() if k != "rows"))
    return result


if __name__ == "__main__":
    harness.cli(main)
