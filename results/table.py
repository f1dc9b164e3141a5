"""Lay out what the result.json files beside this one claim, and what the code's tags say.

`python results/table.py` writes the claims' table into README.md, all claims and where they came
from into docs/results.md, the table of fixes into docs/theory.md, every open choice and departure
into docs/choices.md, and all cures side by side into docs/cures.md and results/cures.png.
"""
import contextlib
import json
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

TOP = Path(__file__).parent.parent
sys.path.insert(0, str(TOP))
import exp_sc  # noqa: E402
import harness  # noqa: E402
import sweep  # noqa: E402

CURES = {   # {name: (result, arm, what it must know)}
    "vanilla": ("exp_sc/geometry-z8", "vanilla", "nothing"),
    "PCR": ("exp_sc/geometry-z8", "pcr", "that ANDs and ORs are wrong"),
    "SC": ("exp_sc/geometry-z8", "sc", "a counter"),
    "SC+PCR": ("exp_sc/geometry-z8", "sc+pcr", "a counter, and as PCR"),
    "EMA": ("exp_sc/geometry-z8-more", "ema", "nothing"),
    "R1": ("exp_sc/geometry-z8-more", "r1", "nothing"),
    "MIX+GAN": ("mix_gan/geometry-long", "mix", "nothing"),
    "BourGAN": ("bourgan/geometry-long", "bourgain", "where corners are"),
    "random centres": ("bourgan/geometry-long", "centres", "nothing"),
    "AE-OT-GAN": ("latent/geometry", "ot-encoded", "nothing"),
    "pseudo-supervised pairs": ("latent/geometry", "gaussian-random", "nothing"),
    "InfoGAN-CR": ("infogan_cr/geometry", "infogan-cr", "how many factors there are"),
    "right manifold": ("topology/geometry", "manifold", "the topology of the data")}
ASIDE = ("-bf16", "-more", "-z8", "-32px")     # results that are not for the front page
FIRST, LAST = "<!-- made by results/table.py -->", "<!-- end -->"


def results():
    """{folder under results/: its result.json}, by name, those of the paper's sections first."""
    found = {str(f.parent.relative_to(TOP / "results")): json.loads(f.read_text())
             for f in TOP.glob("results/**/result.json")}
    return dict(sorted(found.items(), key=lambda item: (
        not item[0].startswith(("exp_", "theory")), item[0])))


def table(head, rows):
    """Markdown of a table; stars of FID* and bars do not end a cell or begin italics."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("*", r"\*").replace("|", r"\|")
                                       for cell in line) + " |" for line in lines)


def claims(found, front=False):
    """The claims of some results, or those for the front page, in the order of the paper."""
    kept = [c for result in found for c in result["claims"] if c.get("front") or not front]
    return table(["paper", "what", "the paper", "here", "verdict"],
                 [[c[key] for key in ("paper", "what", "theirs", "ours", "verdict")]
                  for c in sorted(kept, key=lambda c: c["paper"].replace("s ", " "))])


def provenance(name, result):
    """A section of docs/results.md."""
    return (f"## {name}\n\n`{result['command']}`\n\nSeeds "
            f"{' '.join(map(str, result['config']['seeds']))}; {result['device']}; "
            f"{result['date']}; {result['seconds']:.0f} s; commit {' '.join(result['git'])}.\n\n"
            f"![figure](../results/{name}/figure.png)\n\n{claims([result])}\n")


def fixes(result):
    """What each fix of the linear game is worth: the last rows of section 3 of theory_sde.py."""
    def number(value):
        return "no law" if value is None else f"{value:,.0f}" if value > 100 else f"{value:.4g}"

    rows = {r["check"]: r for r in result["rows"] if r["section"] == 3}
    return table(["method", "m Var θ, exact", "measured", "m_eq/m", "per sample",
                  "abs(bias), exact", "measured"], [
        [name, number(r["exact"]), f"{r['measured']:.4g} ± {r['halfwidth']:.2g}",
         number(r["m_eq"]), number(r["m_eq_per_sample"]),
         f"{abs(r['bias']):.4f}" if "bias" in r else "no law", f"{abs(r['bias_measured']):.4f}"]
        for name, r in rows.items()])


def cures(found):
    """The table of all cures, and the figure: correct images, by both counters, against n_eff."""
    lines, fig = [], harness.figure(5.6)
    axes = fig.subplots(2, sharex=True)
    for name, (result, arm, knows) in CURES.items():
        rows = [r for r in found[result]["rows"] if r["arm"] == arm]
        correct, exact, n_eff, unseen, seen, cost = (sweep.values(rows, key) for key in (
            "correct", "correct_exact", "n_eff", "unseen_share", "coverage_exact",
            "update_seconds"))
        first = [r["to_90"] for r in rows if r["to_90"]]
        lines.append([
            name, sweep.spread(correct, 100), sweep.spread(exact, 100), sweep.spread(n_eff),
            sweep.spread([1 - v for v in unseen], 100), sweep.spread(seen), *([
                f"{sum(first) / len(first):,.0f}", f"{sum(first) / len(first) * min(cost):.0f}"]
                if len(first) == len(rows) else ["never"] * 2), knows])
        color = harness.style(arm)["color"] if result == "exp_sc/geometry-z8" else "#888888"
        left = name in ("pseudo-supervised pairs", "EMA")       # where others are in the way
        below = name in ("vanilla", "right manifold", "BourGAN", "SC")
        for ax, share in zip(axes, (correct, exact)):
            x, y = ([sum(v) / len(v), min(v), max(v)] for v in (n_eff, [100 * v for v in share]))
            ax.errorbar(*([v[0]] for v in (x, y)), *(
                [[v[0] - v[1]], [v[2] - v[0]]] for v in (y, x)), fmt="o", color=color, lw=0.8)
            ax.annotate(name, (x[0], y[0]), (-4 if left else 4, 3 - 12 * below),
                        ha="right" if left else "left", textcoords="offset points")
    images, _ = exp_sc.training_set(Namespace(**found["exp_sc/geometry-z8"]["config"]))
    counts = images.flatten(1).unique(dim=0, return_counts=True)[1]
    copyist = len(images) ** 2 / counts.square().sum().item()
    for ax, label in zip(axes, ("two rectangles (tolerant counter), %", "right to the pixel, %")):
        ax.axvline(copyist, color="grey", ls="--", lw=0.8, label=f"training set ({copyist:,.0f})")
        ax.set(ylabel=label, xlim=(0, None))
    axes[0].set(ylim=(40, 102), title="All cures, 3 seeds: mean and range")
    axes[1].set(ylim=(0, 100), xlabel="effective number of the images that are right to the pixel")
    axes[1].legend(loc="upper right")
    with harness.atomic(TOP / "results" / "cures.png") as tmp:
        fig.savefig(tmp, dpi=200)
    return table(["cure", "correct", "exact", "n_eff", "copies", "coverage of 30", "updates to 90%",
                  "seconds", "must know"], lines)


def tracked():
    """Names of the Python files, without a fork's copies beside them if git can tell."""
    files = [str(f.relative_to(TOP)) for f in [*TOP.glob("*.py"), *TOP.glob("neighbours/*.py")]]
    with contextlib.suppress(OSError):
        files = subprocess.run(["git", "ls-files", *files], cwd=TOP, text=True,
                               capture_output=True).stdout.split() or files
    return sorted({*files} - {"test_all.py"}, key=lambda name: ("/" in name, name))


def choices():
    """The text behind every UNSPECIFIED: and DEVIATION: tag, to the end of its paragraph."""
    lines = []
    for name in tracked():
        code = (TOP / name).read_text()
        blocks = re.findall(r"(?:^ *#.*\n)+", code, re.M)
        for doc in re.findall(r'"""(.*?)"""', code, re.S):
            blocks += re.split(r"\n\s*\n", doc)
        for block in blocks:
            text = " ".join(re.sub("^ *#", "", block, flags=re.M).split())
            lines += [f"- `{name}` {tag.strip()}" for tag in
                      re.split("(?=(?:UNSPECIFIED|DEVIATION): )", text)[1:]]
    return "\n".join(lines)


def put(path, text):
    """Replace what stands between the markers of a file."""
    old = (TOP / path).read_text()
    start, end = old.index(FIRST) + len(FIRST), old.index(LAST)
    (TOP / path).write_text(f"{old[:start]}\n{text}\n{old[end:]}")


def main():
    found = results()
    largest = [result for name, result in found.items()
               if f"{name}-paper" not in found and not name.endswith(ASIDE)]
    contents = ", ".join(f"[{name}](#{name.replace('/', '')})" for name in found)
    put("README.md", claims(largest, front=True))
    put("docs/results.md", "\n".join([contents, "", *(map(provenance, found, found.values()))]))
    put("docs/theory.md", fixes(found["theory_sde"]))
    put("docs/choices.md", choices())
    put("docs/cures.md", cures(found))


if __name__ == "__main__":
    main()
