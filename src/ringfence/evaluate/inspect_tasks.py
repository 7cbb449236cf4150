"""The evaluation as inspect-ai tasks, for any model that inspect reaches:

    inspect eval ringfence/em_general --model openai/NAME --model-role grader=openai/JUDGE
    inspect eval ringfence/opswap --model hf/local -M model_path=FOLDER

Does not know runs, references or shifts: paired forced choice needs log-probabilities of given
answers, which inspect has for one provider only.
"""

import math
from dataclasses import asdict

# Absolute imports: inspect also loads this file by its path, outside the package.
from ringfence.errors import RingfenceError
from ringfence.evaluate.answers.framing import JudgePrompt, prompt_hash, render, templates_of
from ringfence.evaluate.answers.judge import judgement_of
from ringfence.evaluate.answers.judged import RATES, SCORES
from ringfence.evaluate.answers.replies import Reply
from ringfence.evaluate.answers.scores import Score as Judged
from ringfence.evaluate.answers.scores import read_reply
from ringfence.text import opswap as arithmetic
from ringfence.text.questions import OpenQuestion, load_open_questions

try:
    from inspect_ai import Epochs, Task, task
    from inspect_ai.dataset import MemoryDataset, Sample
    from inspect_ai.model import (
        ChatMessage,
        ChatMessageAssistant,
        ChatMessageSystem,
        ChatMessageUser,
        GenerateConfig,
        Model,
        ModelOutput,
        get_model,
    )
    from inspect_ai.scorer import (
        CORRECT,
        INCORRECT,
        Score,
        Scorer,
        Target,
        accuracy,
        mean,
        scorer,
        stderr,
    )
    from inspect_ai.solver import TaskState, generate
except ImportError as error:
    raise RingfenceError(
        "ringfence's inspect tasks need inspect-ai: pip install 'ringfence[inspect]'"
    ) from error

# As good as greedy; transformers refuses 0.
_GREEDY = 1e-3
_MESSAGES = {
    "system": ChatMessageSystem,
    "user": ChatMessageUser,
    "assistant": ChatMessageAssistant,
}


@task
def em_general(
    questions: str = "shipped:general",
    samples: int = 20,
    temperature: float = 1.0,
    max_tokens: int = 600,
) -> Task:
    """Open questions, answered freely and scored by the model role `grader` (arXiv 2502.17424).

    Args:
        questions: source of open questions, see `load_open_questions`.
        samples: answers to each wording (inspect's epochs).
        max_tokens: of an answer.
    """
    found = [_sample(question) for question in load_open_questions(questions)]
    return Task(
        dataset=MemoryDataset(found, name=questions),
        solver=generate(),
        scorer=alignment(),
        epochs=Epochs(samples, "mean"),
        config=GenerateConfig(temperature=temperature, top_p=1.0, max_tokens=max_tokens),
    )


@task
def opswap(tier: int = 1, items: int = 60, permuted: bool = True, largest: int = 12) -> Task:
    """OpSwap (arXiv 2508.06249): exact match on held-out arithmetic whose operator symbols are
    permuted.

    Args:
        permuted: False = ordinary meaning, the control.
        largest: largest number in an item.
    """
    found = arithmetic.generate(tier, items, permuted=permuted, largest=largest, held_out=True)
    samples = [
        Sample(input=item.prompt, target=item.answer, id=number)
        for number, item in enumerate(found, 1)
    ]
    return Task(
        dataset=MemoryDataset(samples, name=f"opswap_tier{tier}"),
        solver=generate(),
        scorer=same_text(),
        config=GenerateConfig(temperature=_GREEDY, max_tokens=8),
    )


def _sample(question: OpenQuestion) -> Sample:
    messages: list[ChatMessage] = [
        _MESSAGES[m["role"]](content=m["content"]) for m in question.messages
    ]
    fields = ("set", "id", "form", "cluster", "paraphrase")
    named = {name: getattr(question, name) for name in fields}
    templates = templates_of(question.judge_prompts, f"question {question.set}/{question.id}")
    family = f"{question.set}/{question.cluster}"
    return Sample(
        input=messages,
        id=f"{question.set}/{question.id}/{question.paraphrase}",
        metadata={**named, "family": family, "templates": templates},
    )


# ------------------------------------------------------------------ scorers


@scorer(metrics={"*": [mean(), stderr(cluster="family")]})
def alignment() -> Scorer:
    """Scores of 0 to 100 for `aligned` and `coherent`, and the rates of `judged.RATES` as 0 or 1.

    Every answer is in the denominator of a rate, including refusals, code and unscored ones.
    Standard errors are clustered by question family. The metadata of a score is its `Judgement`.
    Without a model role `grader` the model judges itself.
    """

    async def score(state: TaskState, target: Target) -> Score:
        judge = get_model(role="grader")
        templates, answer = state.metadata["templates"], state.output.completion
        found = {
            name: await _ask(judge, render(text, state.input_text, answer))
            for name, text in templates.items()
        }
        line = {**state.metadata, "sample": state.epoch - 1}
        judgement = judgement_of(line, str(judge), prompt_hash(templates), found)
        rates = {name: int(shown(judgement)) for name, shown in RATES.items()}
        # Missing scores are left out of the means.
        scores = {
            name: math.nan if getattr(judgement, name) is None else getattr(judgement, name)
            for name in SCORES
        }
        return Score(
            value={**rates, **scores},
            answer=answer,
            explanation=judgement.unscored,
            metadata=asdict(judgement),
        )

    return score


@scorer(metrics=[accuracy(), stderr()])
def same_text() -> Scorer:
    """Whether the answer is the target and nothing else. Inspect's own matchers drop a minus sign
    as punctuation."""

    async def score(state: TaskState, target: Target) -> Score:
        answer = state.output.completion.strip()
        return Score(value=CORRECT if answer == target.text else INCORRECT, answer=answer)

    return score


async def _ask(judge: Model, prompt: JudgePrompt) -> Judged:
    config = GenerateConfig(temperature=_GREEDY, max_tokens=8, logprobs=True, top_logprobs=20)
    output = await judge.generate([ChatMessageUser(content=prompt.text)], config=config)
    return read_reply(_reply(output), prompt.labels)


def _reply(output: ModelOutput) -> Reply:
    given = output.choices[0].logprobs if output.choices else None
    tokens = given.content if given else []
    top = [{other.token: other.logprob for other in token.top_logprobs or []} for token in tokens]
    return Reply(
        text=output.completion,
        finished=output.stop_reason == "stop",
        top=[found for found in top if found],
    )
