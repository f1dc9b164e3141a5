"""Lay out what the result.json files beside this one claim, and what the code's tags say.

`python results/table.py` writes the claims' table into README.md, all claims and where they came
from into docs/results.md, the table of fixes into docs/theory.md, and every open choice and
departure into docs/choices.md.
"""
import json
import re
from pathlib import Path

TOP = Path(__file__).parent.parent
FIRST, LAST = "<!-- made by results/table.py -->", "<!-- end -->"


def results():
    """{folder under results/: its result.json}, in the order of their names."""
    files = sorted(TOP.glob("results/**/result.json"))
    return {str(f.parent.relative_to(TOP / "results")): json.loads(f.read_text()) for f in files}


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
                  for c in sorted(kept, key=lambda c: c["paper"].replace("Figures", "Figure"))])


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


def choices():
    """The text behind every UNSPECIFIED: and DEVIATION: tag, to the end of its paragraph."""
    lines, files = [], [*sorted(TOP.glob("*.py")), *sorted(TOP.glob("neighbours/*.py"))]
    for path in [f for f in files if f.name != "test_all.py"]:
        code = path.read_text()
        blocks = re.findall(r"(?:^ *#.*\n)+", code, re.M)
        for doc in re.findall(r'"""(.*?)"""', code, re.S):
            blocks += re.split(r"\n\s*\n", doc)
        for block in blocks:
            text = " ".join(re.sub("^ *#", "", block, flags=re.M).split())
            lines += [f"- `{path.name}` {tag.strip()}" for tag in
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
               if f"{name}-paper" not in found and not name.endswith("-bf16")]
    put("README.md", claims(largest, front=True))
    put("docs/results.md", "\n".join(provenance(*item) for item in found.items()))
    put("docs/theory.md", fixes(found["theory_sde"]))
    put("docs/choices.md", choices())


if __name__ == "__main__":
    main()
