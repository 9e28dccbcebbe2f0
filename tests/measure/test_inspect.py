"""The inspect_ai task with a student and a grader in this process; skipped without inspect_ai."""

import pytest

pytest.importorskip("inspect_ai")

from inspect_ai import eval as run_eval
from inspect_ai.model import (
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    get_model,
    modelapi,
)
from test_skillmix import by_checks, known_student

from deltaloom.measure._inspect import skill_mix

ASKED = {"k": 2, "combinations": 6, "only": "lipogram in u,words by fives,palindrome"}


@modelapi(name="inproc")
class InProcess(ModelAPI):
    """Answers by a function of the messages."""

    def __init__(self, model_name, base_url=None, api_key=None, config=GenerateConfig(), **args):  # noqa: B008
        super().__init__(model_name, base_url, api_key, [], config)
        self.calls = 0

    async def generate(self, input, tools, tool_choice, config):
        answer = {"student": known_student, "grader": by_checks}[self.model_name]
        messages = [{"role": one.role, "content": one.text} for one in input]
        # three gradings of each text, of which the last is in prose
        text = answer(messages, {"seed": self.calls % 3})
        self.calls += 1
        output = ModelOutput.from_content(self.model_name, text)
        output.usage = ModelUsage(input_tokens=1, output_tokens=1, total_tokens=2)
        return output


def done(tmp_path, graded, gradings=3):
    (log,) = run_eval(
        skill_mix(graded=graded, gradings=gradings, **ASKED),
        model="inproc/student",
        model_roles={"grader": get_model("inproc/grader", memoize=False)},
        log_dir=str(tmp_path),
        display="none",
        max_samples=1,
    )
    assert log.status == "success", log.error
    return log


@pytest.mark.parametrize("graded", [False, True])
def test_two_turns_and_points(tmp_path, graded):
    log = done(tmp_path, graded)
    for sample in log.samples:
        assert [one.role for one in sample.messages] == ["user", "assistant"] * 2
        score = sample.scores["points"]
        # the text has a word of these two topics
        shown = "palindrome" not in sample.metadata["skills"]
        topic = sample.metadata["topic"] in ("gardening", "weather")
        assert score.value["full_marks"] == (shown and topic)
        assert score.metadata["points"].get("palindrome", 0) == 0
    named = {score.name: score.metrics for score in log.results.scores}
    values = [one.scores["points"].value["full_marks"] for one in log.samples]
    assert named["full_marks"]["mean"].value == pytest.approx(sum(values) / len(values))
    assert {"mean", "stderr"} <= set(named["all_skills"]) & set(named["skill_fraction"])
    share = next(one for key, one in named["full_marks"].items() if "words by fives" in key)
    assert share.value == 1.0


def test_what_cannot_be_read_is_unscored(tmp_path):
    prose = "What a text!"
    import test_inspect

    original = test_inspect.by_checks
    test_inspect.by_checks = lambda messages, body: prose
    try:
        log = done(tmp_path, True, gradings=1)
    finally:
        test_inspect.by_checks = original
    assert log.results.scores[0].unscored_samples == 6
