"""The tables of README.md and results/README.md, made from the result.json files beside this one.

    python results/table.py            # print the README's table
    python results/table.py --write    # put it into README.md, and write results/README.md

A verdict compares two lists of numbers, one a seed: `holds` if all of one are better than all of
the other, `in part` if only their means are in that order, `no` if not even these; with one seed
`not decided`. A claim about two numbers has the worse verdict of the two; claims of another kind
have rules of their own below.
"""
import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
FIRST, LAST = "<!-- results: made by results/table.py -->", "<!-- end of results -->"
COMMANDS = {  # a folder here, and the command whose run folder it came from
    "exp_sc/geometry": "python exp_sc.py --preset cpu --seeds 0 1 2",
    "exp_sc/cifar10": "python exp_sc.py --dataset cifar10 --preset cpu --seeds 0 1 2",
    "exp_sc/celeba": "python exp_sc.py --dataset celeba --preset cpu --seeds 0 1 2",
    "exp_pixel_combination/geometry": "python exp_pixel_combination.py --preset cpu --seeds 0 1 2",
    "exp_pixel_combination/cifar10":
        "python exp_pixel_combination.py --dataset cifar10 --preset cpu --seeds 0 1 2",
    "exp_pixel_combination/celeba": "python exp_pixel_combination.py --dataset celeba --preset cpu",
    "exp_sample_insufficiency/geometry":
        "python exp_sample_insufficiency.py --preset cpu --seeds 0 1 2",
    "exp_sample_insufficiency/cifar10":
        "python exp_sample_insufficiency.py --dataset cifar10 --preset cpu",
    "exp_sample_insufficiency/celeba":
        "python exp_sample_insufficiency.py --dataset celeba --preset cpu --seeds 0 1 2",
    **{f"exp_pcr_natural/cifar10-{m}": f"python exp_pcr_natural.py --model {m} --dataset cifar10 "
       f"--preset cpu --arms vanilla pcr dup mixup{more} --seeds 0 1 2"
       for m, more in (("wgangp", " matched"), ("lsgan", ""), ("sagan", ""))},
    "theory_sde": "python theory_sde.py --preset cpu",
}


def read(name):
    """The result.json of a folder, or None."""
    path = HERE / name / "result.json"
    return json.loads(path.read_text()) if path.exists() else None


def values(rows, key, **where):
    """The numbers under `key` of the rows that have these entries, in the order of the file."""
    return [r[key] for r in rows if all(r.get(k) == v for k, v in where.items())]


def mean(numbers):
    return sum(numbers) / len(numbers)


def label(score):
    """The name of a score, safe in Markdown."""
    return score.replace("*", r"\*")


def verdict(better, worse, higher=True):
    """One word on `better` against `worse`, see above."""
    sign = 1 if higher else -1
    a, b = ([sign * x for x in numbers] for numbers in (better, worse))
    if len(a) < 2 or len(b) < 2:
        return "not decided (one seed)"
    return "holds" if min(a) > max(b) else "in part" if mean(a) > mean(b) else "**no**"


def all_of(*words):
    """The verdict of a claim that says several things: the worst."""
    return max(words, key=["holds", "in part", "not decided (one seed)", "**no**"].index)


def spread(numbers):
    """`11.2 (10.9 to 11.6)`, mean and range."""
    low, high = (f"{f(numbers):.3g}" for f in (min, max))
    return f"{mean(numbers):.3g}" + (f" ({low} to {high})" if low != high else "")


def percent(numbers):
    """`73% (70 to 74, n=3)` of shares."""
    low, high = (f"{100 * f(numbers):.0f}" for f in (min, max))
    span = f"{low} to {high}, " if low != high else ""
    return f"{100 * mean(numbers):.0f}% ({span}n={len(numbers)})"


def rectangles(lines):
    """Figures 1, 7 and 3 (top), 2 (left) and 6."""
    if result := read("exp_sc/geometry"):
        rows = result["rows"]
        shares = {a: values(rows, "correct", arm=a) for a in ("vanilla", "pcr", "sc", "sc+pcr")}
        for arm, paper in (("vanilla", "fails often"), ("pcr", "70%"), ("sc", "97%"),
                           ("sc+pcr", "99%")):
            exact = values(rows, "correct_exact", arm=arm)
            lines.append(("Figure 1", f"images of exactly two rectangles, {arm}", paper,
                          f"{percent(shares[arm])}; to the pixel {100 * mean(exact):.0f}%",
                          "" if arm == "vanilla" else verdict(shares[arm], shares["vanilla"])))
        found = values(rows, "coverage_exact", arm="sc+pcr")
        new = values(rows, "unseen_share", arm="sc+pcr")
        lines.append(("Figure 7", "training images found exactly among samples, sc+pcr",
                      "most of 30", f"{', '.join(map(str, found))} of 30 in "
                      f"{rows[0]['n_cover']:,} samples; {100 * mean(new):.0f}% of correct samples "
                      "are new images", "holds" if min(found) > 15 else "**no**"))
    if result := read("exp_sample_insufficiency/geometry"):
        rows = result["rows"]
        for key, what, show, higher in (
                ("correct", "codes with two rectangles", percent, True),
                ("changes_per_code", "codes whose image changes in 1,600 images (25, 100 updates)",
                 percent, False),
                ("d_loss_var", "variance of D's loss, last third",
                 lambda v: f"{mean(v):.2g} (n={len(v)})", False)):
            full, part = values(rows, key, arm="fgd"), values(rows, key, arm="wor", batch=16)
            lines.append(("Figures 2, 6", f"{what}: FGD (64), MGD (16)", "FGD settles, MGD not",
                          f"{show(full)}, {show(part)}", verdict(full, part, higher)))
    if result := read("exp_pixel_combination/geometry"):
        rows = result["rows"]
        last = max(values(rows, "step"))
        for arm, paper in (("vanilla", "prevail"), ("pcr", "not tried")):
            both = [a + b for a, b in zip(values(rows, "share_and", arm=arm, step=last),
                                          values(rows, "share_or", arm=arm, step=last))]
            lines.append(("Figure 3, top", f"samples that are the AND or OR of two images, {arm}",
                          paper, percent(both),
                          ("holds" if min(both) > 0.5 else "in part" if max(both) > 0.1 else
                           "**no**") if arm == "vanilla" else ""))
        for arm in ("vanilla", "pcr"):
            logits = [mean(values(rows, k, arm=arm, step=300))
                      for k in ("d_real", "d_and", "d_or", "d_three")]
            lines.append((
                "Figure 3, top", f"D on reals, AND, OR, three squares elsewhere, {arm}, step 300",
                "reals = AND = OR, early" if arm == "vanilla" else "not tried",
                ", ".join(f"{v:.1f}" for v in logits),
                ("holds" if min(logits[1:3]) > mean([logits[0], logits[3]]) else "**no**")
                if arm == "vanilla" else ""))


def photographs(lines):
    """Table 1, Figures 2 (right), 3 (bottom), 4 and 5."""
    for name in [n for n in COMMANDS if n.startswith("exp_pcr_natural/")]:
        if result := read(name):
            (dataset, model), rows = name.split("/")[1].split("-"), result["rows"]
            paper = result["paper"][f"{dataset}, {model}"]
            kind, early = label(rows[0]["end_score"]), label(rows[0]["score"])
            arms = [a for a in ("vanilla", "pcr", "dup", "mixup", "matched")
                    if values(rows, "arm", arm=a)]
            for what, of in ((kind, lambda r: r["end_fid"]),
                             (kind.replace("FID", "KID"), lambda r: r["end_kid"]),
                             (early, lambda r: r["fid_curve"][-1][2])):
                ends = {a: [of(r) for r in rows if r["arm"] == a] for a in arms}
                over = [verdict(ends["pcr"], ends[a], higher=False) for a in ("dup", "mixup")]
                lines.append(("Table 1", f"{dataset}, {model}: {what}, vanilla → pcr; "
                              f"controls {', '.join(arms[2:])}",
                              f"{paper['vanilla']} → {paper['pcr']}" * (what == kind),
                              f"{spread(ends['vanilla'])} → {spread(ends['pcr'])}; "
                              f"{', '.join(spread(ends[a]) for a in arms[2:])}, "
                              f"n={min(map(len, ends.values()))}",
                              f"{verdict(ends['pcr'], ends['vanilla'], higher=False)}; better than "
                              f"dup and mixup: {all_of(*over)}"))
            lines.append(("Table 1", f"{dataset}, {model}: contrast of photographs, of averages; "
                          f"of fakes: {', '.join(arms)}", "not tried",
                          f"{rows[0]['contrast_real']:.0f}, {rows[0]['contrast_average']:.0f}; "
                          + ", ".join(f"{mean(values(rows, 'contrast', arm=a)):.0f}" for a in arms),
                          ""))
    lines.append(("Table 1", "CelebA and ImageNet", "up to 30% better", "not run", ""))
    for dataset in ("celeba", "cifar10"):
        if result := read(f"exp_sample_insufficiency/{dataset}"):
            rows = result["rows"]
            sizes = sorted(set(values(rows, "batch", arm="vanilla")))
            seen = max(values(rows, "images_seen"))
            ends = {(r["batch"], r["seed"]): r["fid"] for r in rows if r["arm"] == "vanilla"}
            last = {b: [v for (size, _), v in ends.items() if size == b] for b in sizes}
            word = verdict(last[sizes[-1]], last[sizes[0]], higher=False)
            lines.append(("Figure 2, right", f"{dataset}: {rows[0]['score']} after {seen:,} "
                          f"images, batch {', '.join(map(str, sizes))}",
                          "the larger the better", ", ".join(spread(last[b]) for b in sizes)
                          + f", n={len(last[sizes[0]])}", word))
            cures = [[r["fid"] for r in rows if r["arm"] == a and r["images_seen"] == seen]
                     for a in ("ema", "r1", "optimistic")]
            lines.append(("Figure 2, right", f"{dataset}: the same at batch {sizes[0]} with EMA, "
                          "R1, optimistic steps", "not tried", ", ".join(map(spread, cures)), ""))
    for dataset in ("celeba", "cifar10"):
        if result := read(f"exp_pixel_combination/{dataset}"):
            rows = result["rows"]
            fake, real = (values(rows, f"nearer_average_{k}", arm="vanilla", part="combination")
                          for k in ("fake", "heldout"))
            lines.append((
                "Figure 3, bottom", f"{dataset}: images nearer to an average of two training "
                "images than to any; generated, held-out", "generated ones are averages",
                f"{percent(fake)}, {100 * real[0]:.0f}%",
                "holds" if mean(fake) > 0.5 > mean(real) else "**no**: photographs are, too"))
            sets = [values(rows, "fid", method=m) for m in ("gam", "vanilla", "pcr", "held-out")]
            lines.append((
                "Figure 4", f"{dataset}: {values(rows, 'score', method='gam')[0]} of averages of "
                "neighbours, of the GAN, of it with pcr, of held-out images",
                "GAM and GAN comparable", f"{', '.join(map(spread, sets))}, n={len(sets[1])}",
                "not decided: the GAN is small"))
    for dataset in ("cifar10", "celeba"):
        if result := read(f"exp_sc/{dataset}"):
            rows = [r for r in result["rows"] if r["part"] == "sc_natural"]
            last = max(values(rows, "step"))
            for key, what in (("fid", label(rows[0]["score"])), ("dif", "DIF")):
                ends = {a: values(rows, key, arm=a, step=last) for a in ("vanilla", "sc", "random")}
                n_train = result["config"]["n_train"]
                lines.append(("Figure 5", f"{dataset}, {n_train} images: {what}; vanilla, sc, "
                              "random replacement", "sc far better",
                              f"{', '.join(map(spread, ends.values()))}, n={len(ends['sc'])}",
                              all_of(*(verdict(ends["sc"], ends[a], higher=False)
                                       for a in ("vanilla", "random")))))


def theory(lines):
    if result := read("theory_sde"):
        z = [abs(r["z"]) for r in result["rows"] if r["z"] is not None]
        lines.append(("Theorems 1, 2", "variance of θ is Θ(1/m)", "proved",
                      f"exact laws, {len(z)} checks, largest z {max(z):.1f}: t/m (Theorem 1), a "
                      "cycle around 1/m (Theorem 2)", "in part"))
        broken = sum(r["measured"] for r in result["rows"] if r["check"].startswith("theorem3"))
        lines.append(("Theorem 3", "an L-Lipschitz D accepts averages of close reals", "proved",
                      f"{broken:.0f} violations; its premise holds for few pairs, see below",
                      "holds" if not broken else "**no**"))


def table():
    """The README's table, in Markdown."""
    lines = []
    rectangles(lines)
    photographs(lines)
    theory(lines)
    lines.append(("all", "the preset `paper`: the paper's sizes, on a GPU", "", "not run", ""))
    head = ["| paper | what | paper's number | here | claim |", "|---|---|---|---|---|"]
    return "\n".join([*head, *("| " + " | ".join(line) + " |" for line in lines)])


def provenance():
    """results/README.md: where every file came from."""
    lines = ["# Results", "", "Made by `python results/table.py --write`; add `--data-dir` to the "
             "commands, or set `GAN_DATA`. `git`: the commits that the runs were started at. "
             "`seconds`: of the last session, where a run was gone on with. "
             "All ran on the same machine (`x86_64`: not written down as closely then). The runs "
             "of exp_pcr_natural were trained at the first commit named; for the scores at the "
             "end, added at the second, its new flag was written into their configurations, and "
             "the name of the network into their rows.", "",
             "| folder | command | seeds | device | date | seconds | git |",
             "|---|---|---|---|---|---|---|"]
    for name, command in COMMANDS.items():
        if result := read(name):
            seeds = result["config"].get("seeds", [0])
            lines.append(f"| `{name}` | `{command}` | {' '.join(map(str, seeds))} | "
                         f"{result['device']} | {result['date']} | {result['seconds']:.0f} | "
                         f"{' '.join(result['git'])} |")
    return "\n".join(lines) + "\n"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="update the two README files")
    if parser.parse_args(argv).write:
        readme = HERE.parent / "README.md"
        text = readme.read_text()
        start, end = text.index(FIRST) + len(FIRST), text.index(LAST)
        readme.write_text(f"{text[:start]}\n{table()}\n{text[end:]}")
        (HERE / "README.md").write_text(provenance())
    else:
        print(table())


if __name__ == "__main__":
    sys.exit(main())
