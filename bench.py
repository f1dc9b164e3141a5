"""How fast it is here: training steps, runs per hour, and FID; other tools beside it.

    python bench.py [train|fid|distance] [--peers] [--json]

A number is the median of `--repeats` timings, its quartiles beside it. What is compared takes
turns, A B A B, so that noise hits all; `time_ratio` is the median, over the turns, of its time to
that of the first of its group. A share of the peak is counted FLOPs against a large float32 matmul
on the same device and threads. `--peers` times other tools, where installed: see bench_peers.py.
"""
import argparse
import contextlib
import importlib.metadata
import itertools
import json
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
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

CPU = dict(     # seconds of a timing at least, of runs side by side; cells; sizes and counts
    repeats=5, least=0.05, window=10, models=[*natural.MODELS], presets=["paper", "cpu"],
    sizes=[32], jobs=[1, 2, 4, 8], matmul=2048, images=16, dims=[64, 192, 768, 2048])
CUDA = CPU | dict(repeats=9, least=0.5, sizes=[32, 64], matmul=8192, images=256)
SMOKE = CPU | dict(repeats=2, least=0, window=0.1, models=["wgangp"], presets=["smoke"], jobs=[2],
                   matmul=128, images=2, dims=[64])
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def seconds(function, calls, device, clock="wall"):
    """Seconds of a call, the mean of some."""
    synchronize = torch.get_device_module(device).synchronize
    synchronize(device)
    start = CLOCKS[clock]()
    for _ in range(calls):
        function()
    synchronize(device)
    return max(CLOCKS[clock]() - start, 1e-9) / calls


class Bench:
    """What the parts share. `rows` are the numbers, `left_out` the reasons."""

    def __init__(self, args, device):
        self.__dict__ |= SMOKE if args.smoke else CUDA if device.type == "cuda" else CPU
        self.args, self.device, self.repeats = args, device, args.repeats or self.repeats
        self.precisions = sorted(("fp32", "bf16"), key=args.precision.__ne__)
        self.rows, self.left_out, self.versions = [], {}, {"scipy": scipy.__version__}

    def time_in_turns(self, functions):
        """Seconds of each function of {name: function}, warmed up -> {name: (repeats,)}."""
        spent, calls = partial(seconds, device=self.device, clock=self.args.clock), {}
        for name, function in functions.items():
            with self.attempt(name):
                slow = spent(function, 1) > 1
                calls[name] = 1 if slow else max(1, round(self.least / spent(function, 1)))
        turns = [[spent(functions[name], n) for name, n in calls.items()]
                 for _ in range(self.repeats)]
        return dict(zip(calls, np.transpose(turns)))

    @contextlib.contextmanager
    def attempt(self, name):
        """Go on without what fails in here, and say why: a tool may fail in any way."""
        try:
            yield
        except Exception as error:
            self.left_out[name] = f"{type(error).__name__}: {error}".splitlines()[0]

    def peers(self, kind, *args):
        """{tool: function} of those installed, with --peers; imported here and nowhere else."""
        functions = {}
        if self.args.peers:
            import bench_peers
            for tool, build in getattr(bench_peers, kind).items():
                with self.attempt(f"{tool}, {kind}"):
                    functions[tool] = build(*args)
                    self.versions[tool] = importlib.metadata.version(tool)
        return functions

    def row(self, part, name, unit, values, **more):
        """Keep a number, the median of `values`, and print it with its quartiles."""
        low, value, high = (float(v) for v in np.percentile(values, [25, 50, 75]))
        self.rows.append({"part": part, "name": name, "unit": unit, "value": value, "low": low,
                          "high": high, "repeats": np.size(values), **harness.to_jsonable(more)})
        print(f"{part:8s} {name:48s} {value:9.4g} {unit:12s} {low:9.4g} to {high:<9.4g}", "  ".join(
            f"{k} {v:.4g}" for k, v in more.items()))

    def compare(self, part, name, unit, functions, value, more=lambda which, seconds: {}):
        """A row for each function, timed in turns: value(seconds), its time to the first's."""
        times = self.time_in_turns(functions)
        for which, t in times.items():
            ratio = float(np.median(t / next(iter(times.values()))))
            self.row(part, f"{name} {which}", unit, value(t), time_ratio=ratio,
                     **more(which, float(np.median(t))))


class Flops(TorchDispatchMode):
    """Counts FLOPs as PyTorch's FlopCounterMode, whose hooks do not stand a gradient penalty."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func._overloadpacket):
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def make(cfg, arm):
    """A trainer on 10,000 images. What an update costs does not depend on what they show."""
    images = torch.randint(256, (10_000, cfg.channels, cfg.size, cfg.size), dtype=torch.uint8)
    return core.Trainer(cfg, images.to(cfg.device), *natural.networks(cfg), natural.ARMS[arm])


def time_alone(cfg, window, all_ready):
    """Train with PCR, timed once all processes are ready -> updates per second."""
    update, times, calls = make(cfg, "pcr").update, [], 10 if cfg.device.type == "cuda" else 2
    update()
    all_ready.wait()
    while sum(times) * calls < window:
        times.append(seconds(update, calls, cfg.device))
    return 1 / np.mean(times)


def train(b):
    """Updates of G per second by model, preset and arm; then runs per hour, side by side."""
    a, spawn = torch.randn(b.matmul, b.matmul, device=b.device), get_context("spawn")
    b.compare("train", f"float32, {b.matmul} wide", "FLOP/s", {"matmul": lambda: a @ a},
              lambda t: 2 * b.matmul ** 3 / t)
    peak = b.rows[-1]["value"]
    for model, preset, size in itertools.product(b.models, b.presets, b.sizes):
        width = ["--width", "32"] if preset == "cpu" else []    # as the tables of speed have it
        cfg = natural.configure(natural.flags().parse_args(
            ["--preset", preset, "--size", str(size), *width]), model, "cifar10")
        vars(cfg).update(seed=0, device=b.device)
        name, functions, flops = f"{model} {preset}, {size} px,", {}, {}
        asked, other = b.precisions
        for which, arm, precision in (("eager", "vanilla", asked), ("eager pcr", "pcr", asked),
                                      (other, "vanilla", other)):
            cfg.precision = precision
            functions[which] = make(argparse.Namespace(**vars(cfg)), arm).update
            with Flops() as counter:
                functions[which]()
            flops[which] = counter.total
        cfg.precision = asked
        functions |= b.peers("TRAIN", make(cfg, "vanilla"))
        b.compare("train", name, "G steps/s", functions, lambda t: 1 / t,
                  lambda which, t, n=cfg.n_dis, flops=flops: {"d_steps_per_s": n / t, **(
                      {"peak_percent": 100 * flops[which] / t / peak} if which in flops else {})})
        for jobs in b.jobs:
            threads = max(1, harness.cores() // jobs)
            with b.attempt(f"{name} {jobs} together"), spawn.Manager() as manager, \
                    ProcessPoolExecutor(jobs, spawn, torch.set_num_threads, [threads]) as pool:
                all_ready = manager.Barrier(jobs, timeout=300)      # else one that died stops all
                rates = pool.map(partial(time_alone, window=b.window, all_ready=all_ready),
                                 [cfg] * jobs)
                b.row("train", f"{name} eager pcr, {jobs} together", "runs/hour",
                      3600 / cfg.steps * sum(rates))


def frechet(b):
    """Images per second of the FID network, by width and precision."""
    x = torch.randint(256, (b.images, 3, 32, 32), dtype=torch.uint8).to(b.device)
    found = sorted((b.args.data_dir / "inception").glob("*2015*.pth"))      # else random ones
    state = torch.load(found[0], weights_only=True) if found else fid.Inception().state_dict()
    state |= {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}   # for any tool
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        weights = Path(folder) / "weights.pth"
        torch.save(state, weights)
        for dims in b.dims:
            nets = {name: partial(fid.load_inception(
                dims, weights, device=b.device, precision=precision), x)
                for name, precision in zip(("fid.py", b.precisions[1]), b.precisions)}
            peers = b.peers("FEATURES", weights, x) if dims == 2048 else {}
            b.compare("fid", f"{dims} features,", "images/s", nets | peers, lambda t: len(x) / t)


def distance(b):
    """Seconds of the distance between two sets of random features, and what comes out."""
    dims, gen, sides = b.dims[-1], core.generator(0), []
    mix = torch.randn(dims, dims, generator=gen) / dims ** 0.5
    for _ in range(2):
        stats = fid.Statistics()
        stats.add((torch.randn(2 * dims, dims, generator=gen) @ mix).relu())
        sides += [stats.mean, stats.cov]
    mu1, cov1, mu2, cov2 = arrays = [side.numpy() for side in sides]
    functions = {
        "fid.py": partial(fid.frechet_distance, *sides),
        "scipy sqrtm": lambda: ((mu1 - mu2) ** 2).sum() + np.trace(
            cov1 + cov2 - 2 * scipy.linalg.sqrtm(cov1 @ cov2).real),
        **b.peers("DISTANCE", arrays, sides)}
    b.compare("fid", f"distance of {dims} features,", "s", functions, lambda t: t,
              lambda which, t: {"distance": float(functions[which]())})


def main(argv=None):
    parts = {"train": train, "fid": frechet, "distance": distance}
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("part", nargs="?", choices=parts, help="default: all")
    p.add_argument("--peers", action="store_true", help="other tools too, where installed")
    p.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    p.add_argument("--smoke", action="store_true", help="seconds: to see that everything works")
    p.add_argument("--repeats", type=int, help="timings of each; default 5, on a GPU 9")
    p.add_argument("--clock", choices=CLOCKS, default="wall",
                   help="cpu: processor time, for a busy machine (%(default)s)")
    p.add_argument("--precision", choices=("fp32", "bf16"), default="fp32",
                   help="of what is timed; the other one is beside it (%(default)s)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    p.add_argument("--data-dir", type=Path, default=data.DATA_DIR, help="may hold FID's weights")
    args = p.parse_args(argv)
    device, start, load = harness.pick_device(args.device), time.time(), os.getloadavg()
    if args.repeats is not None and args.repeats < 1:
        raise core.UserError(f"--repeats {args.repeats}: must be at least 1")
    if args.clock == "cpu" and device.type == "cuda":
        raise core.UserError("--clock cpu: sees nothing of a GPU; take --clock wall")
    b = Bench(args, device)
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
        for part in [args.part] if args.part else parts:
            parts[part](b)
    result = {
        "device": harness.chip(device) if device.type == "cuda" else "cpu",
        "processor": harness.chip(torch.device("cpu")), "cores": harness.cores(),
        "threads": torch.get_num_threads(), "load": load[0], "repeats": b.repeats,
        "clock": args.clock, "precision": args.precision, "seconds": time.time() - start,
        "versions": {**harness.versions(), **b.versions}, "rows": b.rows, "left_out": b.left_out}
    print(json.dumps(result) if args.json else "\n".join(
        f"{k}: {v}" for k, v in result.items() if k != "rows"))
    return result


if __name__ == "__main__":
    harness.cli(main)
