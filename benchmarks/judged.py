"""The demo's runs, asked open questions and judged by the embedded model, next to the paired
measure.

    ringfence demo --all
    python benchmarks/judged.py runs/demo/all    # about 20 minutes on two CPU cores; it resumes

Every third question of shipped:general, in its plain form and first wording, 20 answers each. The
judge is weak, and the report says so: this shows the tables, not the worth of the models. Writes
report.html into the folder of the demo, and prints the table of docs/judging.md.
"""

import sys
from pathlib import Path

import yaml

from ringfence.report.page import write_page
from ringfence.report.read import read_rows
from ringfence.run.evaluate import evaluate_target
from ringfence.text.sources import SHIPPED
from ringfence.util.intervals import percents

RUNS = ("sound", "undefended", "kl", "interleave", "treft")
JUDGE = "{model: default, opening: 'Number: '}"


def main() -> None:
    demo = Path(sys.argv[1])
    questions = demo / "plain.yaml"
    questions.write_text(every_third_plain_question())
    answers = f"{{questions: ['{questions}'], samples: 20, max_new_tokens: 100, judges: [{JUDGE}]}}"
    folders = [evaluate_target(str(demo / name), [f"evaluate.answers={answers}"]) for name in RUNS]
    records, rows = read_rows(folders, demo / "sound")
    write_page(records, rows, demo / "report.html")
    print(
        "| run | other domains, effect | misaligned | relaxed | incoherent | mean aligned | mean "
        "coherent |"
    )
    print("|" + "---|" * 7)
    for row in rows:
        rates = [row.answers[f"plain.{name}"] for name in ("misaligned", "relaxed", "incoherent")]
        means = [row.answers[f"plain.{name}"] for name in ("aligned", "coherent")]
        cells = [str(row.sets["out_of_domain"].headline)]
        cells += [f"{100 * rate.mean:.1f} % {percents(rate)}" for rate in rates]
        cells += [f"{mean.mean:.0f} [{mean.low:.0f}, {mean.high:.0f}]" for mean in means]
        print(f"| {row.name} | " + " | ".join(cells) + " |")


def every_third_plain_question() -> str:
    entries = yaml.safe_load((SHIPPED / "general.yaml").read_text("utf-8"))
    plain = [entry for entry in entries if not entry["id"].endswith(("_json", "_template"))]
    for entry in plain:
        entry["paraphrases"] = entry["paraphrases"][:1]
    return yaml.safe_dump(plain[::3], allow_unicode=True)


if __name__ == "__main__":
    main()
