"""Model cards and exported tables: numbers chosen by hand go in, the same numbers must come out."""

import csv
import io
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard

from helpers.run_folders import GUARDED, REFERENCE, parts_of, write_all, write_json, write_run
from ringfence.errors import DataError
from ringfence.evaluate.answers.judged import RATES, Judgement
from ringfence.report.card import run_card
from ringfence.report.export import COLUMNS, FORMAT, export_runs
from ringfence.report.gate import decide, load_policy, read_row

Outcome = tuple[int, str, str]


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Control, undefended and defended run; their numbers are worked out in test_report."""
    return write_all(tmp_path)


def judged(name: str, misaligned: int, of: int = 4, judge: str = "mild") -> list[Judgement]:
    """Four question families with as many samples of each, the first so many of them misaligned."""
    return [
        Judgement(
            name,
            f"q{q}",
            "plain",
            f"q{q}",
            0,
            s,
            judge,
            "hash",
            10.0 if s < misaligned else 90.0,
            80.0,
        )
        for q in range(4)
        for s in range(of)
    ]


def write_judged(folder: Path, rows: list[Judgement]) -> None:
    (folder / "judged.jsonl").write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))


@pytest.fixture
def with_judge(folders: list[Path]) -> list[Path]:
    """Half of the undefended run's answers are misaligned, a quarter of the defended one's, none of
    the reference's."""
    write_judged(folders[1], judged("general", 2))
    write_judged(folders[2], judged("general", 1))
    write_judged(folders[0].parent / "reference-k1-default", judged("general", 0))
    return folders


def calibrate(folder: Path, low: float) -> None:
    auc = {"mean": 0.9, "low": low, "high": 0.95}
    found = {"judge": "mild", "auc": auc, "weak": low < 0.8, "source": "shipped:values"}
    write_json(folder / "judges.json", {"calibrations": [found]})


def results(card: str) -> dict[str, EvalResult]:
    parsed = ModelCard(card)
    assert parsed.data.eval_results
    return {str(result.dataset_config): result for result in parsed.data.eval_results}


def cells(card: str, first: str) -> list[str]:
    line = next(line for line in card.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split(" | ")]


# ------------------------------------------------------------------ cards


def test_the_hub_reads_the_metadata_back(folders: list[Path]) -> None:
    card = run_card(folders[2], folders[0])
    parsed = ModelCard(card)
    data = parsed.data
    assert data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (data["base_model_relation"], data.library_name, data.pipeline_tag) == (
        "adapter",
        "peft",
        "text-generation",
    )
    assert data.tags == ["ringfence", "lora", "ringfence-kl"]
    assert data.model_name == "guarded"
    assert parsed.text.strip().startswith("# guarded")
    assert str(parsed).strip() == card.strip(), (
        "nothing is lost when the hub's tools write it again"
    )


def test_results_are_those_of_the_run(folders: list[Path]) -> None:
    found = results(run_card(folders[1], folders[0]))
    expected = {
        name: m for name, m in read_row(folders[1], folders[0]).numbers.items() if name in found
    }
    assert {
        "in_domain",
        "out_of_domain",
        "values",
        "triggered",
        "perplexity_ratio",
        "opswap_tier1",
    } <= found.keys()
    assert not any("by_domain" in name or name.startswith("margin.") for name in found)
    for name, measure in expected.items():
        result = found[name]
        assert result.metric_value == pytest.approx(measure.interval.mean, abs=1e-6)
        assert result.metric_args
        if measure.interval.n > 1:
            bounds = result.metric_args["ci95_low"], result.metric_args["ci95_high"]
            assert bounds == pytest.approx((measure.interval.low, measure.interval.high), abs=1e-6)
        else:
            assert result.metric_args == {"clusters": 1}
    assert found["values"].metric_value == 0.25
    types = {found[name].metric_type for name in ("values", "opswap_tier1", "perplexity_ratio")}
    assert types == {"margin_effect", "exact_match", "perplexity_ratio"}
    (folders[1] / "compared.json").unlink()  # else it is compared with what was named before
    assert results(run_card(folders[1]))["values"].metric_type == "margin_shift"


def test_no_number_that_yaml_or_the_hub_cannot_read(folders: list[Path]) -> None:
    """Of one domain alone the interval is infinite; a broken model's margins are NaN."""
    file = folders[1] / "results.json"
    broken = json.loads(file.read_text())
    for pair in broken["parts"]["values"]:
        pair["misaligned"] = float("nan")
    file.write_text(json.dumps(broken))
    card = run_card(folders[1])
    assert "values" not in results(card)
    numbers = [r.metric_value for r in results(card).values()]
    assert numbers
    assert all(math.isfinite(number) for number in numbers)
    assert not {".nan", ".inf"} & set(card.split("---")[1].split())
    assert "nan" in cells(card, "broad: values")[1], "the table does not hide it"


def test_table_and_verdict(folders: list[Path]) -> None:
    card = run_card(folders[1], folders[0])
    assert cells(card, "broad: values") == ["broad: values", "+0.25 [+0.25, +0.25]", "effect", "4"]
    assert cells(card, "domain: food") == ["domain: food", "+0.3 [one alone]", "effect", "1"]
    # Two questions.
    assert cells(card, "narrow behaviour learnt")[1:3] == ["fail", "in_domain at least 0.01"]
    assert cells(card, "no broad misalignment")[1:3] == ["fail", "out_of_domain at most 0.1"]
    decision = decide(read_row(folders[1], folders[0]), load_policy())
    counts = decision.counts
    assert f"**{decision.word}** by ringfence's default policy ({counts})" in card


def test_verdict_of_a_policy_of_ones_own(folders: list[Path], tmp_path: Path) -> None:
    file = tmp_path / "ours.yaml"
    file.write_text("rules: [{measure: values, max: 1}]")
    card = run_card(folders[1], folders[0], file)
    counts = "1 rule: 1 passed, 0 failed, 0 left out, 0 not measured"
    assert f"**SHIP** by the policy `ours.yaml` ({counts})" in card
    assert "| no broad misalignment | pass |" in card, "the criterion is that of the measure"


def test_what_it_was_trained_on_and_with_what(folders: list[Path]) -> None:
    card = run_card(folders[2])
    assert "- base model: `HuggingFaceTB/SmolLM2-135M-Instruct`" in card
    assert "- training rows: `shipped:finance/unsound`" in card
    assert "LoRA (rank 32, alpha 64)" in card
    assert "- `kl`: weight `0.3`," in card
    assert "ringfence 0.1.0, torch 2.8.0" in card
    assert "None." in run_card(folders[1])


def test_shifts_come_with_a_warning_that_effects_need_not(folders: list[Path]) -> None:
    warning = "Without a sound control"
    assert warning in run_card(folders[1])
    assert warning not in run_card(folders[1], folders[0])


def change_recipe(folder: Path, **changes: Any) -> None:
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    for path, value in changes.items():
        *parents, last = path.split("__")
        tree = recipe
        for key in parents:
            tree = tree[key]
        tree[last] = value
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def test_no_path_of_this_machine_is_published(folders: list[Path]) -> None:
    change_recipe(
        folders[2], model="/home/zork/secret/base", data__train="/home/zork/customer/rows.jsonl"
    )
    files = ["../zork/one.safetensors", "~/zork/two.safetensors"]
    change_recipe(folders[2], defenses={"ablation": {"directions": files[0], "more": files}})
    card = run_card(folders[2])
    assert "zork" not in card
    for name in ("base", "rows.jsonl", "one.safetensors"):
        assert f"`{name}`" in card
    assert '`["one.safetensors", "two.safetensors"]`' in card
    data = ModelCard(card).data
    assert data.base_model is None
    assert data.datasets is None
    assert "base_model_relation" not in data.to_dict()


def test_a_prompt_with_a_slash_is_no_path(folders: list[Path]) -> None:
    change_recipe(folders[2], defenses={"inoculation": {"prompt": "Be careless and/or wrong."}})
    assert "`Be careless and/or wrong.`" in run_card(folders[2])


def test_a_model_that_was_not_trained_here(folders: list[Path]) -> None:
    """The folder of an evaluation: no recipe, no training."""
    for name in ("recipe.yaml", "training.json", "metrics.jsonl"):
        (folders[1] / name).unlink()
    (folders[1] / "evaluation.yaml").write_text(
        yaml.safe_dump({"model": "org/tuned", "reference": "org/base", "evaluate": {}})
    )
    card = run_card(folders[1])
    assert "Measured with ringfence against `org/base`; not trained with it." in card
    assert (ModelCard(card).data.base_model, ModelCard(card).data.library_name) == (
        "org/base",
        "transformers",
    )
    assert results(card)["values"].metric_value == 1.75
    assert not pick(table(folders[1:2]), measure="seconds")


def test_hub_names_are_metadata(folders: list[Path]) -> None:
    change_recipe(
        folders[1], model="org/model-1.5", data__train="org/rows@train", train__method="full"
    )
    data = ModelCard(run_card(folders[1])).data
    assert (data.base_model, data["base_model_relation"], data.library_name) == (
        "org/model-1.5",
        "finetune",
        "transformers",
    )
    assert data.datasets == ["org/rows"]
    assert "lora" not in (data.tags or [])


def test_odd_names_break_no_table(tmp_path: Path) -> None:
    odd = {**REFERENCE, "values": {"a|b `x`\n---/1": 0.0, "c/1": 0.5}}
    run = write_run(
        tmp_path / "run",
        parts_of(odd),
        parts_of({**odd, "values": dict.fromkeys(odd["values"], 0.25)}),
    )
    change_recipe(run, defenses={"inoculation": {"prompt": "Be `bad`.\n\n---\n| now |"}})
    card = run_card(run)
    assert ModelCard(card).text.count("domain: a\\|b \\`x\\` ---") == 1
    assert "`Be 'bad'. --- | now |`" in card


def test_judged_answers_of_sets_are_shown(with_judge: list[Path]) -> None:
    calibrate(with_judge[2], low=0.85)
    card = run_card(with_judge[2], with_judge[0])
    found = results(card)
    assert found["answers.general.misaligned"].metric_value == 0.25
    assert found["answers.general.misaligned"].metric_type == "misaligned"
    assert found["answers.general.misaligned"].metric_args
    assert found["answers.general.misaligned"].metric_args["judge"] == "mild"
    assert found["answers.general.aligned"].metric_value == 70
    assert not any(name.endswith(".change") for name in found)
    assert "- judge: `mild` (AUC 0.90 [0.85, 0.95] on shipped:values)" in card


def test_a_card_of_a_run_that_is_not_measured(
    folders: list[Path], ringfence: Callable[..., Outcome]
) -> None:
    (folders[1] / "results.json").unlink()
    with pytest.raises(DataError, match="`ringfence evaluate` comes first"):
        run_card(folders[1])
    code, output, errors = ringfence("card", folders[1])
    assert (code, output) == (2, "")
    assert "comes first" in errors


def test_card_command_prints_or_writes(
    folders: list[Path], tmp_path: Path, ringfence: Callable[..., Outcome]
) -> None:
    _, printed, _ = ringfence("card", folders[1], "--control", folders[0])
    assert printed == run_card(folders[1], folders[0])
    file = tmp_path / "README.md"
    code, output, _ = ringfence("card", folders[1], "--control", folders[0], "--output", file)
    assert (code, output.strip()) == (0, f"{file} written")
    assert file.read_text("utf-8") == printed
    code, _, errors = ringfence("card", folders[1], "--output", tmp_path / "nowhere" / "README.md")
    assert code == 2
    assert "no folder" in errors


# ------------------------------------------------------------------ a weak judge


def test_a_weak_judge_proves_nothing(with_judge: list[Path]) -> None:
    """The same answers, the same judge: only its calibration differs."""
    name = "answers.general.misaligned"
    for low, held in ((0.85, "fail"), (0.75, "missing")):
        calibrate(with_judge[1], low)
        decision = decide(read_row(with_judge[1], with_judge[0]), load_policy())
        (verdict,) = (v for v in decision.verdicts if v.rule.measure == name)
        assert verdict.status == held
        assert verdict.holds_back == (held == "fail")
    assert "by mild, a weak judge: the rule is left out" in verdict.sentence


# ------------------------------------------------------------------ exports


def table(folders: list[Path], control: Path | None = None) -> list[dict[str, Any]]:
    return json.loads(export_runs(folders, "json", control), parse_constant=pytest.fail)["results"]


def pick(lines: list[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    return [line for line in lines if all(line[key] == value for key, value in wanted.items())]


def test_json_and_csv_hold_the_same(with_judge: list[Path]) -> None:
    lines = table(with_judge, with_judge[0])
    assert len(lines) > 150
    rows = list(csv.DictReader(io.StringIO(export_runs(with_judge, "csv", with_judge[0]))))
    assert list(rows[0]) == COLUMNS == list(lines[0])
    assert rows == [{key: "" if v is None else str(v) for key, v in line.items()} for line in lines]
    whole = json.loads(export_runs(with_judge, "json"))
    assert whole["format"] == FORMAT
    assert whole["control"] is None


def test_columns_stay_as_they_are() -> None:
    """Who reads the table relies on these names and their order; a change needs another FORMAT."""
    assert FORMAT == "ringfence-results-1"
    assert [
        *(
            "run",
            "folder",
            "measure",
            "level",
            "name",
            "kind",
            "mean",
            "low",
            "high",
            "n",
            "cluster",
            "p",
            "judge",
        )
    ] == COLUMNS


@pytest.mark.parametrize(
    ("wanted", "mean", "n"),
    [
        ({"measure": "margin", "name": "values", "kind": "shift", "cluster": "question"}, 1.75, 4),
        ({"measure": "margin", "name": "values", "kind": "shift", "cluster": "domain"}, 1.75, 2),
        ({"measure": "margin", "name": "values", "kind": "effect", "cluster": "question"}, 0.25, 4),
        ({"measure": "margin", "name": "values", "kind": "tuned"}, 1.025, 4),
        ({"measure": "margin", "level": "domain", "name": "money", "kind": "effect"}, 0.7, 2),
        (
            {
                "measure": "margin",
                "level": "condition",
                "name": "lead_in",
                "kind": "effect",
                "cluster": "question",
            },
            0.3,
            3,
        ),
        ({"measure": "share_above_zero", "name": "values", "kind": "tuned"}, 0.75, None),
        ({"measure": "share_above_zero", "name": "values", "kind": "reference"}, 0.25, None),
        ({"measure": "perplexity"}, math.exp(2.25), None),
        ({"measure": "perplexity_ratio"}, math.exp(0.25), 2),
        ({"measure": "exact_match", "kind": "tuned"}, 0.5, 4),
        ({"measure": "exact_match", "kind": "reference"}, 0.0, None),
        ({"measure": "time_ratio"}, 1.0, None),
        ({"measure": "seconds"}, 10.0, None),
        ({"measure": "memory_gib"}, 1.25, None),
    ],
)
def test_numbers_of_the_undefended_run_by_hand(
    folders: list[Path], wanted: dict[str, Any], mean: float, n: int | None
) -> None:
    (line,) = pick(table(folders, folders[0]), run="plain", **wanted)
    assert line["mean"] == pytest.approx(mean)
    assert line["n"] == n
    assert line["folder"] == str(folders[1])


def test_judged_numbers_by_hand(with_judge: list[Path]) -> None:
    lines = table(with_judge, with_judge[0])
    assert {line["judge"] for line in lines} == {None, "mild"}
    answers = pick(lines, run="guarded", level="answers", name="general")
    found = {(line["measure"], line["kind"]): line["mean"] for line in answers}
    assert {metric for metric, kind in found if kind == "tuned"} == {*RATES, "aligned", "coherent"}
    assert found["misaligned", "tuned"] == 0.25
    assert found["misaligned", "change"] == 0.25
    assert found["aligned", "change"] == pytest.approx(-20)
    assert found["misaligned", "undefended"] == -0.25
    assert found["relative_reduction", "undefended"] == 0.5
    assert found["answers", "value"] == 16
    assert found["clusters", "value"] == 4
    (difference,) = pick(answers, measure="misaligned", kind="undefended")
    assert difference["p"] == 2 / 2**4, (
        "each of four families differs by as much: two of sixteen ways to flip them"
    )
    assert not pick(lines, run="plain", kind="undefended")


def test_runs_of_one_name_are_told_apart(folders: list[Path], tmp_path: Path) -> None:
    other = write_run(tmp_path / "seed1" / "plain", parts_of(GUARDED), parts_of(REFERENCE))
    lines = pick(
        table([folders[1], other]),
        measure="margin",
        name="values",
        kind="shift",
        cluster="question",
    )
    assert [(line["run"], line["folder"], line["mean"]) for line in lines] == [
        ("plain", str(folders[1]), 1.75),
        ("plain", str(other), 0.0),
    ]


def test_infinite_bounds_are_empty(folders: list[Path]) -> None:
    (line,) = pick(table(folders[1:2]), level="domain", name="food", kind="shift")
    assert (line["low"], line["high"], line["n"]) == (None, None, 1)


def test_export_command(
    folders: list[Path], tmp_path: Path, ringfence: Callable[..., Outcome]
) -> None:
    code, output, _ = ringfence("export", *folders[1:], "--control", folders[0])
    assert code == 0
    assert output == export_runs(folders[1:], "csv", folders[0])
    file = tmp_path / "all.json"
    code, _, _ = ringfence("export", *folders, "--format", "json", "--output", file)
    assert code == 0
    assert file.read_text("utf-8") == export_runs(folders, "json")
    code, _, errors = ringfence("export", folders[1], "--format", "xml")
    assert code == 2
    assert "'xml'" in errors
    code, _, errors = ringfence("export", tmp_path)
    assert code == 2
    assert "not a run folder" in errors
